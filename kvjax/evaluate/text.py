"""Text as evaluation reads it: one string, tokenised once, cut into windows."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

Join = Literal["auto", "newline", "blank-line"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenised text.

    Attributes:
      tokens: `[n]` int32.
      nbytes: length of the text in UTF-8.
      name: file name, for reports.
      join: what stands between the file's lines, "newline" or "blank-line".
    """

    tokens: np.ndarray
    nbytes: int
    name: str
    join: str


def read_file(path: Any, option: str = "text") -> str:
    """A UTF-8 file as it is; OSError or ValueError, in one line that names `option`, for one that cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{option}={str(path)!r}` is not UTF-8 ({error.reason} at byte {error.start}); pass a UTF-8 text file."
        ) from None
    except OSError as error:
        raise OSError(f"`{option}={str(path)!r}` cannot be read ({error.strerror}); pass a UTF-8 text file.") from None


def read_text(path: Any, join: Join = "auto", option: str = "text") -> tuple[str, str]:
    """A text file as one string.

    Args:
      path: UTF-8 text.
      join: "newline": the file as it is. "blank-line": every line is a paragraph, and a blank line is put between any
        two; the usual form of raw WikiText, whose copies come without blank lines. "auto": "blank-line" where the file
        has no blank line of its own, else "newline".
      option: what errors call it.

    Returns:
      The text, and "newline" or "blank-line".

    Raises:
      OSError, ValueError: one line, for a file that cannot be read or is not UTF-8.
    """
    if join not in ("auto", "newline", "blank-line"):
        raise ValueError(f'`join={join!r}` must be "auto", "newline" or "blank-line".')
    text = read_file(path, option).strip("\n")
    if join == "auto":
        join = "newline" if "\n\n" in text or "\n \n" in text else "blank-line"
    return (text.replace("\n", "\n\n") if join == "blank-line" else text), join


def tokenize(model: Any, path: Any, join: Join = "auto", option: str = "text") -> Text:
    """Reads and tokenises a file for `model`, in one piece and with whatever its tokenizer puts in front."""
    text, joined = read_text(path, join, option)
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    return Text(np.asarray(ids, np.int32), len(text.encode()), Path(path).name, joined)


def windows(text: Text, context: int, count: int | None = None) -> np.ndarray:
    """The text's first `count` windows of `context` tokens, `[n, context]`: back to back, the last partial one dropped.

    Raises:
      ValueError: for a window without a prediction, and where the text is too short.
    """
    if context < 2:
        raise ValueError(f"`context={context}` must be at least 2 tokens: the first of a window is not predicted.")
    available = len(text.tokens) // context
    if available < 1:
        raise ValueError(
            f"`text={text.name!r}` has {len(text.tokens)} tokens, less than one window of `context={context}`; "
            "use a longer text or a smaller context."
        )
    if count is not None and not 1 <= count <= available:
        raise ValueError(f"`windows={count}` must lie between 1 and the {available} windows of {text.name!r}.")
    count = count or available
    return text.tokens[: count * context].reshape(count, context)
