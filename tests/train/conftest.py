"""A text of our own and what is drawn from it; no test here needs a file from outside the project."""

import numpy as np
import pytest

from kvjax.train import data, tasks

WORDS = """the a sea ship captain wind river stone house night morning old grey small great said went came saw
    held under over across before after and but when where slowly never always with without his her their"""


def write_text(words: int, seed: int = 0) -> str:
    """Sentences of random words, a paragraph every few of them."""
    rng = np.random.default_rng(seed)
    vocabulary = WORDS.split()
    drawn = [vocabulary[i] for i in rng.integers(0, len(vocabulary), words)]
    ends = rng.integers(0, 12, words)
    return "".join(word + ({0: ".\n\n", 1: ".\n", 2: ", "}.get(end, " ")) for word, end in zip(drawn, ends))


@pytest.fixture(scope="session")
def text() -> str:
    return write_text(60_000)


@pytest.fixture(scope="session")
def tokenizer():
    return data.load_tokenizer()


@pytest.fixture(scope="session")
def tokens(text, tokenizer) -> np.ndarray:
    return data.tokenize(tokenizer, text)


@pytest.fixture
def source(tokens, tokenizer) -> tasks.Source:
    return tasks.Source(data.Passages(tokens, seed=1), tokenizer, vocab=4096)
