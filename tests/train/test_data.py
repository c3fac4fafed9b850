"""Reading, tokenizing and drawing passages."""

import gzip
import lzma

import numpy as np
import pytest

from kvjax.train import data


@pytest.mark.parametrize("suffix, opener", [(".txt", open), (".txt.xz", lzma.open), (".txt.gz", gzip.open)])
def test_reads_plain_and_compressed_text(tmp_path, suffix, opener):
    path = tmp_path / f"book{suffix}"
    with opener(path, "wb") as file:
        file.write("Call me\r\nIshmaël.\n".encode())
    assert data.read_text(path) == "Call me\nIshmaël.\n"


def broken_files(folder):
    (folder / "latin.txt").write_bytes("Ishmaël".encode("latin-1"))
    (folder / "cut.txt.xz").write_bytes(lzma.compress(b"Call me Ishmael." * 100)[:-20])
    (folder / "other.txt.gz").write_bytes(b"not gzip at all")
    (folder / "folder.txt").mkdir()
    return ["latin.txt", "cut.txt.xz", "other.txt.gz", "folder.txt", "absent.txt"]


def test_a_text_that_cannot_be_read_is_one_line_naming_it(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(ValueError, match=name) as error:
            data.read_text(tmp_path / name)
        assert "\n" not in str(error.value)


def test_pieces_tokenize_as_the_whole(text, tokenizer):
    whole = text.replace(". ", ".\n\n\n ")
    assert len(whole) > 250_000  # at least two cuts
    np.testing.assert_array_equal(data.tokenize(tokenizer, whole), tokenizer.encode(whole).ids)


def test_text_without_line_ends_is_one_piece(tokenizer):
    text = "word " * 50_000
    assert tokenizer.decode(data.tokenize(tokenizer, text).tolist()) == text


def test_trained_tokenizer_keeps_digits_apart_and_text_whole(text):
    tokenizer = data.train_tokenizer(text, vocab=300)
    assert tokenizer.get_vocab_size() == 300
    assert (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")) == (0, 1)
    encoded = tokenizer.encode(" is 48213 ü.")
    assert [t for t in encoded.tokens if t.isdigit()] == list("48213")
    assert tokenizer.decode(encoded.ids) == " is 48213 ü."


def test_corpus_is_kept_and_mapped(tmp_path, tokenizer):
    book = tmp_path / "book.txt"
    book.write_text("One two three.\n" * 50)
    first = data.load_corpus([book, book], tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = data.load_corpus([book, book], tokenizer, tmp_path / "cache")
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(first, again)
    assert data.fingerprint(first) == data.fingerprint(again) != data.fingerprint(first[:-1])


def test_bad_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "absent.json"):
        with pytest.raises(ValueError, match=path.name):
            data.load_tokenizer(path)


def test_an_epoch_hands_out_every_piece_once():
    tokens = np.arange(103)
    passages = data.Passages(tokens, seed=0, piece=10)
    epochs = [np.concatenate([passages.take(n) for n in (7, 33, 60)]) for _ in range(2)]
    for epoch in epochs:  # the three tokens behind the last whole piece are never seen
        np.testing.assert_array_equal(np.sort(epoch), np.arange(100))
    assert not np.array_equal(*epochs)


def test_position_is_the_whole_state(tokens):
    passages = data.Passages(tokens, seed=3)
    passages.take(12_345)
    other = data.Passages(tokens, seed=3)
    other.position = passages.position
    np.testing.assert_array_equal(passages.take(50_000), other.take(50_000))
    assert not np.array_equal(data.Passages(tokens, seed=4).take(100), data.Passages(tokens, seed=3).take(100))


def test_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="empty"):
        data.Passages(np.zeros(0, np.uint16), seed=0)
