"""The training loss is the plain forward pass's, gradients included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.train import loss

CONFIG = ModelConfig(2, 32, 48, 4, 2, 8, vocab=96, tie_embeddings=True, initializer_range=0.2)


def plain(model, tokens, weights):
    chosen = jax.nn.log_softmax(forward(model, tokens[:, :-1]))
    losses = -jnp.take_along_axis(chosen, tokens[:, 1:, None], axis=-1)[..., 0]
    return (losses * weights).sum(), losses


def draw(rows, length, vocab=96, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    return tokens, rng.random((rows, length)).astype(np.float32)


def gradients(function, model, tokens, weights):
    def of_state(state):
        return function(model.with_state(state), tokens, weights)

    return jax.jit(jax.value_and_grad(of_state, has_aux=True))(model.state)


@pytest.mark.parametrize(
    "change, length, logits",
    [
        ({}, 140, 96 * 3 * 28),  # five chunks of 28 tokens a row; queries in chunks of 128 and 12
        ({"kv_heads": 1, "sliding_window": 50, "tie_embeddings": False}, 140, 1 << 22),  # one chunk of logits
    ],
)
def test_loss_and_gradients_are_the_plain_forward_passs(monkeypatch, change, length, logits):
    monkeypatch.setattr(loss, "LOGITS", logits)
    config = dataclasses.replace(CONFIG, **change)
    model = init_random(config, make_rope(8, 2048), seed=1)
    tokens, weights = draw(3, length)
    (total, losses), found = gradients(loss.token_losses, model, tokens, weights)
    (total_, losses_), wanted = gradients(plain, model, tokens, weights)
    np.testing.assert_allclose(losses, losses_, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(total, total_, rtol=1e-5)
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name] / scale, wanted[name] / scale, atol=2e-5, err_msg=name)


def test_loss_by_hand():
    """Zero weights make every token equally likely: log V each, and the gradient of the head sums to zero."""
    model = init_random(CONFIG, make_rope(8, 2048), seed=0)
    model = model.with_state(jax.tree.map(jnp.zeros_like, model.state))
    tokens, weights = draw(2, 16)
    total, losses = jax.jit(loss.token_losses)(model, tokens, weights)
    np.testing.assert_allclose(losses, np.full((2, 16), np.log(96)), rtol=1e-6)
    np.testing.assert_allclose(total, weights.sum() * np.log(96), rtol=1e-6)


def test_bfloat16_is_close_and_the_loss_stays_float32():
    model = init_random(CONFIG, make_rope(8, 2048), seed=1)
    tokens, weights = draw(3, 64)
    low = model.with_state({name: x.astype(jnp.bfloat16) for name, x in model.state.items()})
    total, losses = jax.jit(loss.token_losses)(low, tokens, weights)
    wanted, _ = jax.jit(loss.token_losses)(model, tokens, weights)
    assert losses.dtype == total.dtype == jnp.float32
    np.testing.assert_allclose(total, wanted, rtol=1e-2)


@pytest.mark.parametrize(
    "rows, length, vocab, chunks",
    [(16, 512, 4096, 8), (64, 128, 4096, 8), (8, 1023, 4096, 11), (1, 512, 4096, 1), (9999, 7, 4096, 7)],
)
def test_chunks_divide_the_row_and_bound_the_logits(rows, length, vocab, chunks):
    assert loss._chunks(rows, length, vocab) == chunks
