"""A text of our own and what is drawn from it; no test here needs a file from outside the project."""

import numpy as np
import pytest

from kvjax.train import data, recipe, tasks

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


@pytest.fixture(scope="session")
def small_tokenizer(text):
    return data.train_tokenizer(text, vocab=300)


@pytest.fixture(scope="session")
def small_corpus(text, small_tokenizer) -> data.Corpus:
    tokens = data.tokenize(small_tokenizer, text)
    held_out = tokens[-3000:]
    text_bytes = len(small_tokenizer.decode(held_out.tolist()).encode())
    return data.Corpus(tokens[:-3000], held_out, text_bytes, small_tokenizer)


@pytest.fixture(scope="session")
def small_recipe() -> recipe.Recipe:
    """Ten steps of four windows, in two phases. One length of window only: compiling takes longer than training."""
    shape = recipe.Shape(layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=8, vocab=300)
    mix = {"prose": 0.4, "recall": 0.2, "copied": 0.2, "repeated": 0.2}
    phases = (
        recipe.Phase("first", 5 * 256, (64,), (1e-2, 1e-2), mix),
        recipe.Phase("second", 5 * 256, (64,), (1e-2, 1e-3), mix, facts=(1, 2)),
    )
    return recipe.Recipe(phases, tokens_per_step=256, model=shape, optimizer=recipe.Optimizer(warmup_steps=2))
