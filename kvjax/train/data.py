"""From a text file to passages of tokens: reading, byte-level BPE, tokenizing, drawing passages.

Everything is deterministic: the same files and seed give the same tokens in the same order, and the place in
the stream is one integer, so a run that was cut off goes on with the token it would have seen.
"""

import dataclasses
import gzip
import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<s>", "</s>"
TINY_TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer.json"
HELD_OUT_BYTES = 500_000
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file, plain or compressed (`.xz`, `.gz`); every kind of line end becomes a line feed.

    Raises:
      ValueError: the file is missing, unreadable, damaged or not UTF-8; one line that says which.
    """
    path = Path(path)
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is not UTF-8 text (byte {error.start}); convert it, for example with iconv."
        ) from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"`{path}` is not a whole {path.suffix} file ({error}); copy it again.") from None
    except OSError as error:
        raise ValueError(
            f"`{path}` cannot be read ({error.strerror or error}); give the path of a text file."
        ) from None


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """Trains a byte-level BPE with every digit its own piece; `<s>` is 0 and `</s>` is 1.

    Digits stay apart so that a number is recalled digit by digit, whichever number it is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return tokenizer


def load_tokenizer(path: str | Path = TINY_TOKENIZER) -> Tokenizer:
    """Reads a `tokenizer.json`; by default that of the model that ships with kvjax."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{path}` is not a tokenizer.json; give such a file, `tiny` or `train`.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"`{path}` is not a tokenizer.json: {error}") from None


def _pieces(text: str, size: int = 100_000) -> Iterator[str]:
    """Cuts text into pieces of about `size` characters that tokenize as the whole text does.

    A cut goes before a line end that follows a visible character: the pre-tokenizer's pattern looks ahead, at
    what follows white space, and never back.
    """
    start = 0
    while start < len(text):
        end = start + size
        while (end := text.find("\n", end)) > 0 and text[end - 1].isspace():
            end += 1
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def tokenize(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Tokens of `text` as uint16 (uint32 for more than 65,536 pieces), on all cores, in bounded memory."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    arrays: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        arrays.extend(np.asarray(encoding.ids, dtype) for encoding in tokenizer.encode_batch_fast(batch))
        batch.clear()

    for piece in _pieces(text):
        batch.append(piece)
        if len(batch) == 64:
            flush()
    flush()
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def load_corpus(paths: Sequence[str | Path], tokenizer: Tokenizer, cache: Path | None = None) -> np.ndarray:
    """Tokens of the texts end to end, `[tokens]`.

    With `cache`, a folder, the tokens are kept there under a name made of the files' names, sizes and times
    and of the tokenizer, and mapped into memory the next time.
    """
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"`{path}` is not a file; give the path of a text (.txt, .txt.xz, .txt.gz).")
    key = repr([(Path(p).name, Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in paths])
    name = f"tokens-{hashlib.sha256((key + tokenizer.to_str()).encode()).hexdigest()[:16]}.npy"
    if cache and (cache / name).is_file():
        return np.load(cache / name, mmap_mode="r")
    tokens = np.concatenate([tokenize(tokenizer, read_text(path)) for path in paths])
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{name}.partial.npy"  # renamed when whole: a killed run leaves no half file
        np.save(partial, tokens)
        partial.rename(cache / name)
    return tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything a run reads.

    Attributes:
      train: tokens to train on, `[tokens]`.
      held_out: tokens kept apart for the report, `[tokens]`.
      held_out_bytes: of the text that `held_out` encodes.
      tokenizer: made them.
    """

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    tokenizer: Tokenizer


def prepare(
    paths: Sequence[str | Path],
    vocab: int,
    tokenizer: str = "tiny",
    held_out: str | Path | None = None,
    cache: Path | None = None,
) -> Corpus:
    """Reads and tokenizes the texts of a run.

    Args:
      paths: texts to train on.
      vocab: pieces of the tokenizer, as the model's shape says.
      tokenizer: `tiny` (that of the model that ships), `train` (a new one from the texts; kept in `cache`) or the
        path of a tokenizer.json.
      held_out: text for the report; of a long one the last 500 kB. None: the last 1 % of the training texts, which
        are then not trained on.
      cache: folder that keeps tokens, and a trained tokenizer, for the next run.
    """
    trained = cache / "tokenizer.json" if cache else None
    if tokenizer == "train" and trained and trained.is_file():
        made = load_tokenizer(trained)
    elif tokenizer == "train":
        made = train_tokenizer("\n".join(map(read_text, paths)), vocab)
        if trained:
            trained.parent.mkdir(parents=True, exist_ok=True)
            made.save(str(trained))
    else:
        made = load_tokenizer(TINY_TOKENIZER if tokenizer == "tiny" else tokenizer)
    if made.get_vocab_size() != vocab:
        raise ValueError(
            f"The tokenizer has {made.get_vocab_size()} pieces and the recipe says model.vocab={vocab}; "
            f"give --set model.vocab={made.get_vocab_size()} or another tokenizer."
        )
    tokens = load_corpus(paths, made, cache)
    if held_out is None:
        kept = min(len(tokens) // 100, HELD_OUT_BYTES // 3)
        train, rest = tokens[: len(tokens) - kept], np.asarray(tokens[len(tokens) - kept :])
        return Corpus(train, rest, len(made.decode(rest.tolist()).encode()), made)
    text = read_text(held_out).encode()[-HELD_OUT_BYTES:].decode(errors="ignore")
    return Corpus(tokens, tokenize(made, text), len(text.encode()), made)


def fingerprint(tokens: np.ndarray) -> str:
    """Digest of a token array; a run goes on only with the tokens it began with."""
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:16]


class Passages:
    """Passages of a corpus, without repetition until all of it was seen.

    The corpus is cut into pieces that are visited in an order drawn anew for each epoch, and passages are
    taken from them end to end. Pieces are far longer than passages, so few passages contain a seam.

    Attributes:
      position: tokens handed out so far; set it to go on from there.
    """

    def __init__(self, tokens: np.ndarray, seed: int, piece: int = 16_384):
        self._piece = min(piece, len(tokens))
        if not self._piece:
            raise ValueError("The corpus is empty; give a text with at least one window of tokens.")
        self._tokens, self._seed = tokens, seed
        self._pieces = len(tokens) // self._piece  # what is left after the last whole piece is never seen
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))
        self.position = 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, `[count]`."""
        parts = []
        while count:
            visit, offset = divmod(self.position, self._piece)
            start = self._piece_at(visit) * self._piece + offset
            part = self._tokens[start : start + min(count, self._piece - offset)]
            parts.append(part)
            self.position += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else self._tokens[:0]

    def _piece_at(self, visit: int) -> int:
        epoch, index = divmod(visit, self._pieces)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._pieces))
        return int(self._order[1][index])
