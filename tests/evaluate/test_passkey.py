"""Prompts are what they claim to be; answers are read through the real cache."""

import types

import numpy as np
import pytest

import kvjax
from kvjax.evaluate.passkey import DIGITS, QUESTION, STATEMENT, depths_of, passkey, prompts, tasks_of
from kvjax.evaluate.report import passkey_table


class Characters:
    """A tokenizer of one token per character, 0 in front of a text."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + list(map(ord, text))}

    def decode(self, tokens):
        return "".join(chr(t) for t in tokens)


@pytest.mark.parametrize("haystack", [None, "\u00b7".join(["abcd"] * 100)])
def test_prompts(haystack):
    hay = None if haystack is None else np.array(list(map(ord, haystack)))
    made = prompts(Characters(), hay, 300, depths_of(4), trials=3, seed=1)
    assert [p.depth for p in made] == [d for d in (0.125, 0.375, 0.625, 0.875) for _ in range(3)]
    for prompt in made:
        assert prompt.tokens.shape == (300,) and prompt.tokens[0] == 0
        text = Characters().decode(prompt.tokens[1:])
        statement = STATEMENT.format(key=prompt.key)
        assert text.count(statement) == 1 and text.endswith(QUESTION) and text.count(prompt.key) == 2
        assert text.index(statement) == prompt.position - 1
        hay_tokens = 300 - 1 - len(statement) - len(QUESTION)
        assert abs((prompt.position - 1) / hay_tokens - prompt.depth) <= 0.5 / hay_tokens
        assert len(prompt.key) == DIGITS and prompt.key[0] != "0"
    assert len({p.key for p in made}) == 12
    again = prompts(Characters(), hay, 300, depths_of(4), trials=3, seed=1)
    assert all((a.tokens == b.tokens).all() for a, b in zip(made, again))
    other = prompts(Characters(), hay, 300, depths_of(4), trials=3, seed=2)
    assert other[0].key != made[0].key


def test_prompts_that_cannot_be_made():
    model = types.SimpleNamespace(tokenizer=Characters(), config=types.SimpleNamespace(max_positions=512))
    with pytest.raises(ValueError, match="use at least"):
        tasks_of(model, None, [40])
    with pytest.raises(ValueError, match="longer text"):
        tasks_of(model, np.arange(10), [200])
    with pytest.raises(ValueError, match="beyond the model's 512"):
        tasks_of(model, None, [1000])
    with pytest.raises(ValueError, match="trials=0"):
        tasks_of(model, None, [200], trials=0)
    with pytest.raises(ValueError, match="empty"):
        tasks_of(model, None, [])


def test_tiny_recalls_the_key():
    model = kvjax.load("tiny")
    results = passkey(model, [kvjax.policy("bf16", model)], lengths=[96], depths=2, trials=2, progress=False)
    assert [(r.quant, r.length, r.depth, r.trials, r.correct, r.recall) for r in results] == [
        ("bf16", 96, depth, 2, 2, 1.0) for depth in (0.25, 0.75)
    ]
    keys = ["quant", "bits_per_element", "length", "depth", "trials", "correct", "recall", "seconds"]
    assert list(results[0].to_json()) == keys and results[0].bits_per_element == 16.0
    assert passkey_table(results).row_count == 1
