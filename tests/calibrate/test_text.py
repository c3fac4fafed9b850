"""Calibration tokens from files and from the model itself."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvjax.calibrate.text import self_sampled_tokens, tokens_from_file

# One token per word: its number.
WORDS = SimpleNamespace(tokenizer=lambda text, verbose: {"input_ids": [int(w) for w in text.split()]})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(str(i) for i in range(100)), encoding="utf-8")
    return path


def test_windows_are_cut_from_the_text(text):
    windows, source = tokens_from_file(WORDS, text, samples=8, length=10, seed=0)
    assert windows.shape == (8, 10) and windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all() and len(set(windows[:, 0])) > 4
    assert source.startswith("numbers.txt sha256:") and len(source) == len("numbers.txt sha256:") + 64
    np.testing.assert_array_equal(windows, tokens_from_file(WORDS, text, 8, 10, seed=0)[0])
    assert (windows != tokens_from_file(WORDS, text, 8, 10, seed=1)[0]).any()
    np.testing.assert_array_equal(tokens_from_file(WORDS, text, 1, 100)[0], [np.arange(100)])


def test_bad_files_are_refused(text):
    with pytest.raises(OSError, match="nowhere"):
        tokens_from_file(WORDS, text.parent / "nowhere.txt", 1, 10)
    with pytest.raises(OSError):
        tokens_from_file(WORDS, text.parent, 1, 10)
    with pytest.raises(ValueError, match="has 100 tokens, but a sample takes 101"):
        tokens_from_file(WORDS, text, 1, 101)
    text.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 tokens"):
        tokens_from_file(WORDS, text, 1, 10)
    text.write_bytes(b"\xfd7zXZ\x00\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        tokens_from_file(WORDS, text, 1, 10)


def test_the_model_writes_its_own_text(small):
    tokens, source = self_sampled_tokens(small, samples=2, length=20, seed=5, progress=False)
    assert tokens.shape == (2, 20) and source == "self-sampled, seed 5"
    assert (tokens[:, 0] == 3).all()
    # At temperature 1 rows differ, and half of the ids being ends of text ends none of them.
    assert len({tuple(row) for row in tokens}) == 2
    assert all(len(set(row[-4:])) > 1 for row in tokens)
    np.testing.assert_array_equal(tokens, self_sampled_tokens(small, 2, 20, seed=5, progress=False)[0])
