"""Bits per byte and pass-key recall."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.train import data, report, step, tasks


def test_bits_per_byte_of_a_model_that_knows_nothing(small_recipe):
    model = step.initial_model(small_recipe)
    model = model.with_state(jax.tree.map(jnp.zeros_like, model.state))
    found = report.bits_per_byte(model, np.arange(130) % 300, text_bytes=260, window=20)
    assert found["predicted_tokens"] == 6 * 19
    assert found["perplexity"] == pytest.approx(300, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(np.log2(300) * 130 / 260, rel=1e-5)


def test_too_little_held_out_text_is_refused(small_recipe):
    with pytest.raises(ValueError, match="at least 2"):
        report.bits_per_byte(step.initial_model(small_recipe), np.zeros(1), 1)


def test_passkey_prompts_have_the_length_the_fact_and_the_question(tokens, tokenizer):
    windows, answers = report.passkey_windows(tokenizer, tokens, length=200, trials=20, seed=0)
    assert windows.shape == (20, 200 + answers.shape[1])
    depths = set()
    for window, answer in zip(windows, answers):
        prompt = tokenizer.decode(window[:200].tolist())
        number = re.fullmatch(r" (\d{5})", tokenizer.decode(answer.tolist())).group(1)
        assert prompt.endswith(" " + tasks.question("pass key"))
        assert prompt.count(tasks.statement("pass key", number)) == 1
        depths.add(prompt.index(number) // 50)
        np.testing.assert_array_equal(window[200:], answer)
    assert len(depths) > 5
    with pytest.raises(ValueError, match="`recall_lengths`: 20 "):
        report.passkey_windows(tokenizer, tokens, length=20, trials=1, seed=0)


def test_the_model_that_ships_recalls_and_an_untrained_one_does_not(small_recipe, tokens, tokenizer):
    model = kvjax.load("tiny")
    assert report.recall(model, tokenizer, tokens, length=256, trials=10) >= 0.9
    untrained = model.with_state(jax.tree.map(lambda x: x * 0, model.state))
    assert report.recall(untrained, tokenizer, tokens, length=256, trials=10) == 0


def test_the_shipped_model_predicts_the_held_out_novel_as_its_card_says():
    book = data.TINY_TOKENIZER.parents[4] / "shared" / "data" / "moby-dick.txt"
    if not book.is_file():
        pytest.skip("needs moby-dick.txt beside the project (../shared/data)")
    text = data.read_text(book)[-200_000:-150_000]  # the card's 2.209 is over the last 500 kB
    tokens = data.tokenize(data.load_tokenizer(), text)
    found = report.bits_per_byte(kvjax.load("tiny"), tokens, len(text.encode()))
    assert found["bits_per_byte"] == pytest.approx(2.2, abs=0.15)
