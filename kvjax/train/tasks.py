"""What the windows are filled with: prose, facts to recall, copied passages, repeated random tokens.

A model of a few million parameters that is fed prose alone does not learn to look anything up. Random tokens
repeated with a random period are what teaches it (induction heads: arXiv 2209.11895), facts with questions
about them turn that into recall, and copied passages sit in between.

Each task fills one window: `[length]` token ids and as many loss weights; `weights[i]` is for predicting
`tokens[i]`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from kvjax.train.data import Passages

SUBJECTS = (
    "pass key", "secret number", "lucky number", "door code", "room number", "magic number",
    "ticket number", "phone number", "key of the house", "number of the ship", "price of the horse",
    "code of the safe", "number of the regiment", "page of the letter", "weight of the stone",
    "height of the tower", "year of the war", "number of the train", "sum of the debt",
    "count of the sheep", "mark of the captain", "tax of the king", "number of the star", "age of the tree",
)  # fmt: skip
NUMBERS = range(10_000, 100_000)  # five digits, none leading zero

Window = tuple[np.ndarray, np.ndarray]


def statement(subject: str, number: str) -> str:
    """The fact as the passkey test of kvjax puts it: the number is said twice."""
    return f"The {subject} is {number}. Remember it: {number} is the {subject}."


def question(subject: str, number: str = "") -> str:
    """The question with its answer; without a number, as the passkey test asks it."""
    return f"What is the {subject}? The {subject} is" + (f" {number}." if number else "")


@dataclasses.dataclass(frozen=True)
class Source:
    """What the tasks draw from.

    Attributes:
      passages: the corpus.
      tokenizer: writes the facts.
      vocab: number of pieces; the first `specials` are never drawn at random.
      facts: fewest and most facts in a recall window; fewer where the window is too short.
    """

    passages: Passages
    tokenizer: Tokenizer
    vocab: int
    facts: tuple[int, int] = (1, 4)
    specials: int = 2

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def prose(source: Source, rng: np.random.Generator, length: int) -> Window:
    """Consecutive text."""
    return source.passages.take(length).astype(np.int32), np.ones(length, np.float32)


def recall(source: Source, rng: np.random.Generator, length: int) -> Window:
    """Prose with facts at random places and, at the end, a question about each of them in random order."""
    count = int(rng.integers(source.facts[0], source.facts[1] + 1))
    subjects = [SUBJECTS[i] for i in rng.choice(len(SUBJECTS), count, replace=False)]
    # Drawn without replacement: an answer stands for one fact only.
    numbers = [str(NUMBERS[n]) for n in rng.choice(len(NUMBERS), count, replace=False, shuffle=False)]
    told = [source.encode(f" {statement(s, n)}") for s, n in zip(subjects, numbers)]
    breaks = [" \n"[i] for i in rng.integers(0, 2, count)]
    asked = [source.encode(b + question(s, n)) for b, s, n in zip(breaks, subjects, numbers)]
    # A short window takes as many facts as leave it some prose.
    while told and sum(map(len, told)) + sum(map(len, asked)) > length - 8:
        told.pop()
        asked.pop()
    rest = source.passages.take(length - sum(map(len, told)) - sum(map(len, asked))).astype(np.int32)
    cuts = np.sort(rng.integers(0, len(rest) + 1, len(told)))
    pieces = np.split(rest, cuts)
    window = [pieces[0]]
    for fact, piece in zip(told, pieces[1:]):
        window += [fact, piece]
    window += [asked[i] for i in rng.permutation(len(asked))]
    return np.concatenate(window), np.ones(length, np.float32)


def copied(source: Source, rng: np.random.Generator, length: int) -> Window:
    """Prose in which one passage comes again, word for word, further on."""
    size = int(rng.integers(min(16, length // 4), length // 3 + 1))
    text = source.passages.take(length - size).astype(np.int32)
    start = int(rng.integers(0, len(text) - size + 1))
    again = int(rng.integers(start + size, len(text) + 1))
    window = np.concatenate([text[:again], text[start : start + size], text[again:]])
    return window, np.ones(length, np.float32)


def repeated(source: Source, rng: np.random.Generator, length: int) -> Window:
    """Random tokens repeated with a random period; only the repetitions count, the first round is noise."""
    period = int(rng.integers(2, length // 2 + 1))
    tokens = rng.integers(source.specials, source.vocab, period).astype(np.int32)
    return np.resize(tokens, length), (np.arange(length) >= period).astype(np.float32)


Task = Callable[[Source, np.random.Generator, int], Window]
TASKS: dict[str, Task] = {"prose": prose, "recall": recall, "copied": copied, "repeated": repeated}


def draw_batch(
    source: Source, rng: np.random.Generator, mix: dict[str, float], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch of windows, the task of each drawn with the probabilities `mix`.

    Returns:
      tokens int32 and weights float32, both `[rows, length]`, and tasks `[rows]`, indices into `TASKS`.
    """
    probabilities = np.array([mix.get(name, 0.0) for name in TASKS])
    tasks = rng.choice(len(TASKS), rows, p=probabilities / probabilities.sum())
    windows = [list(TASKS.values())[task](source, rng, length) for task in tasks]
    return np.stack([w[0] for w in windows]), np.stack([w[1] for w in windows]), tasks
