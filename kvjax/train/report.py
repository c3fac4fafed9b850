"""What a trained model reaches: bits per byte of held-out text, and recall of a pass key."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from kvjax.model.llama import LoadedModel
from kvjax.train.data import Corpus
from kvjax.train.loss import hidden, token_losses
from kvjax.train.tasks import NUMBERS, question, statement

ROWS = 8  # windows at once


@jax.jit
def _total_loss(model: LoadedModel, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    return token_losses(model, tokens, weights)[0]


def bits_per_byte(model: LoadedModel, tokens: np.ndarray, text_bytes: int, window: int = 1024) -> dict[str, float]:
    """Loss on a text, in whole windows that each begin without context.

    bits per byte = mean loss per predicted token in bits * tokens per byte of the whole text.

    Args:
      model: the model.
      tokens: of the text, `[tokens]`; what does not fill the last window is left out.
      text_bytes: of the text that they encode.
      window: length in tokens; a shorter text is one window.

    Returns:
      `bits_per_byte`, `perplexity` per token, and `predicted_tokens`.
    """
    window = min(window, len(tokens))
    if window < 2:
        raise ValueError(f"`tokens` holds {len(tokens)} tokens of held-out text; at least 2 are needed.")
    count = len(tokens) // window
    windows = np.asarray(tokens[: count * window], np.int32).reshape(count, window)
    total = 0.0
    for start in range(0, count, ROWS):
        rows = windows[start : start + ROWS]
        padded = np.zeros((ROWS, window), np.int32)  # one shape, one compilation
        padded[: len(rows)] = rows
        weights = np.zeros((ROWS, window - 1), np.float32)
        weights[: len(rows)] = 1
        total += float(_total_loss(model, padded, weights))
    predicted = count * (window - 1)
    nats = total / predicted
    return {
        "bits_per_byte": nats / math.log(2) * len(tokens) / text_bytes,
        "perplexity": math.exp(nats),
        "predicted_tokens": predicted,
    }


@jax.jit
def _last_choices(model: LoadedModel, tokens: jax.Array, answer: jax.Array) -> jax.Array:
    """Whether the last tokens `answer` `[B, A]` of each row are all the model's first choice, `[B]`."""
    x = hidden(model, tokens[:, :-1])[:, -answer.shape[1] :]
    return jnp.all(jnp.argmax(model.module().logits(x), axis=-1) == answer, axis=-1)


def passkey_windows(
    tokenizer: Tokenizer, haystack: np.ndarray, length: int, trials: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[trials, length + A]` that end with the answer, and the answers `[trials, A]`.

    A prompt of `length` tokens is prose with one fact at a random depth and the question at its end.
    """
    rng = np.random.default_rng(seed)
    windows, answers = [], []
    for _ in range(trials):
        number = str(NUMBERS[rng.integers(len(NUMBERS))])
        fact = tokenizer.encode(f" {statement('pass key', number)} ").ids
        asked = tokenizer.encode(f" {question('pass key')}").ids
        whole = tokenizer.encode(f" {question('pass key', number)}").ids[:-1]  # without the full stop
        prose = length - len(fact) - len(asked)
        if prose < 0 or prose > len(haystack):
            raise ValueError(
                f"`recall_lengths`: {length} tokens cannot be made of a fact, its question "
                f"({len(fact) + len(asked)} tokens) and {len(haystack)} tokens of held-out text; give another length."
            )
        start, depth = rng.integers(len(haystack) - prose + 1), rng.integers(prose + 1)
        around = haystack[start : start + prose].tolist()
        windows.append(around[:depth] + fact + around[depth:] + whole)
        answers.append(whole[len(asked) :])
    return np.array(windows, np.int32), np.array(answers, np.int32)


def recall(
    model: LoadedModel, tokenizer: Tokenizer, haystack: np.ndarray, length: int, trials: int = 50, seed: int = 0
) -> float:
    """Share of pass keys that greedy decoding would say, in prompts of `length` tokens.

    Each digit is checked given the right ones before it, which is the same as decoding: all must be right.
    """
    windows, answers = passkey_windows(tokenizer, haystack, length, trials, seed)
    right = [_last_choices(model, windows[i : i + 10], answers[i : i + 10]) for i in range(0, trials, 10)]
    return float(np.concatenate([np.asarray(r) for r in right]).mean())


def report(model: LoadedModel, corpus: Corpus, recall_lengths=(), trials: int = 50) -> dict:
    """All figures of a model as one JSON-ready dict; `recall` by length in tokens."""
    found: dict = bits_per_byte(model, corpus.held_out, corpus.held_out_bytes)
    found["recall"] = {
        str(length): recall(model, corpus.tokenizer, corpus.held_out, length, trials) for length in recall_lengths
    }
    return found
