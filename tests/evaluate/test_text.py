"""Reading, joining and cutting text."""

import types

import numpy as np
import pytest

from kvjax.evaluate.text import Text, read_text, tokenize, windows


def write(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding=encoding)
    return path


def test_joining_lines(tmp_path):
    paragraphs = write(tmp_path, "= A =\nb c\n\u00e9\n")
    assert read_text(paragraphs, "newline") == ("= A =\nb c\n\u00e9", "newline")
    assert read_text(paragraphs, "blank-line") == ("= A =\n\nb c\n\n\u00e9", "blank-line")
    assert read_text(paragraphs) == ("= A =\n\nb c\n\n\u00e9", "blank-line")
    assert read_text(write(tmp_path, "a\nb\n\nc")) == ("a\nb\n\nc", "newline")
    assert read_text(write(tmp_path, " \n a \n \n b")) == (" \n a \n \n b", "newline")  # tokenised WikiText


def test_tokens_and_bytes(tmp_path):
    def tokenizer(text, verbose):
        return {"input_ids": [0, *map(ord, text)]}

    model = types.SimpleNamespace(tokenizer=tokenizer)
    text = tokenize(model, write(tmp_path, "a\u00e9\nb"), "newline")
    assert text.tokens.tolist() == [0, 97, 233, 10, 98]
    assert (text.nbytes, text.name, text.join) == (5, "text.txt", "newline")


def test_windows_drop_the_last_partial_one():
    text = Text(np.arange(11, dtype=np.int32), 30, "t", "newline")
    np.testing.assert_array_equal(windows(text, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(windows(text, 3, 2), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("context", "count", "message"),
    [(12, None, "11 tokens"), (1, None, "context=1"), (3, 4, "windows=4"), (3, 0, "windows=0")],
)
def test_windows_that_cannot_be_had(context, count, message):
    with pytest.raises(ValueError, match=message):
        windows(Text(np.arange(11, dtype=np.int32), 30, "t", "newline"), context, count)


def test_unreadable_text(tmp_path):
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(write(tmp_path, "\u00e9", "latin-1"))
    with pytest.raises(OSError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(OSError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="join"):
        read_text(write(tmp_path, "a"), "space")
