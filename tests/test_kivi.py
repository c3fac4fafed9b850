"""KIVI exactly: every prompt length and every step against a plain streaming implementation of the paper's algorithm.

arXiv 2402.02750, Algorithm 1, as the released code orders it: a step attends over the packed tokens and the exact
residuals, then a full key residual is packed whole and the value residual's oldest token alone.
"""

import jax
import numpy as np
import pytest
from cases import make_policy

from kvjax import decode
from kvjax.model.rope import make_rope
from kvjax.presets import kivi, named
from kvjax.queries import rotate_tokens, seen_stored

K, G, H, T, R, GROUP = 2, 2, 16, 32, 32, 8
PROMPTS, STEPS = (*range(1, R + 7), *range(2 * R - 2, 2 * R + 3)), R + 9  # prompts in tokens, a row each
SHAPE = decode.CacheShape(1, K * G, K, H, make_rope(H, 256))


def coded(x, bits, axis):
    """Group-wise rounding along `axis` (all of it is one group), with scale and zero in float16, as stored."""
    zero = x.min(axis, keepdims=True)
    scale = ((x.max(axis, keepdims=True) - zero) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    zero = zero.astype(np.float16).astype(np.float32)
    steps = np.clip(np.round((x - zero) / np.where(scale > 0, scale, 1)), 0, 2**bits - 1)
    return np.where(scale > 0, steps, 0) * scale + zero


class Streaming:
    """One head's state: packed keys and values (here: what they decode to) and the two exact residuals."""

    def __init__(self, bits, window):
        self.bits, self.window = bits, window
        self.k_packed, self.k_residual, self.v_packed, self.v_residual = [], [], [], []

    def pack_keys(self, tokens):
        tokens = np.stack(tokens)  # [R, H]
        for group in tokens.reshape(-1, GROUP, H):
            self.k_packed += list(coded(group, self.bits, 0))

    def pack_value(self, token):
        self.v_packed.append(coded(token.reshape(-1, GROUP), self.bits, 1).reshape(H))

    def prefill(self, k, v):
        full = len(k) // self.window * self.window
        if full:
            self.pack_keys(k[:full])
        self.k_residual = list(k[full:])
        cut = max(0, len(v) - self.window)
        for token in v[:cut]:
            self.pack_value(token)
        self.v_residual = list(v[cut:])

    def step(self, q, k, v):
        self.k_residual.append(k)
        self.v_residual.append(v)
        self.seen = len(self.k_packed), len(self.v_packed)
        keys = np.array(self.k_packed + self.k_residual, np.float64)
        values = np.array(self.v_packed + self.v_residual, np.float64)
        scores = keys @ q.astype(np.float64) / np.sqrt(H)
        p = np.exp(scores - scores.max())
        out = p @ values / p.sum()
        if len(self.k_residual) == self.window:
            self.pack_keys(self.k_residual)
            self.k_residual = []
        if len(self.v_residual) == self.window + 1:
            self.pack_value(self.v_residual.pop(0))
        return out


def rotated(x):
    """RoPE at positions 0, 1, ... of `x[n, heads, H]`, in the library's float32."""
    position = np.arange(len(x))[None, :]
    return np.asarray(rotate_tokens(SHAPE, x.swapaxes(0, 1)[None], position, np.array([len(x)])))[0].swapaxes(0, 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_prompt_length_and_step(bits):
    rng = np.random.default_rng(bits)
    n = PROMPTS[-1] + STEPS
    k, v = rng.normal(size=(2, n, K, H)).astype(np.float32)
    q = rng.normal(size=(n, K * G, H)).astype(np.float32)
    policy = make_policy(kivi(bits, GROUP, R), 1, K, H)
    cache = decode.init_cache(SHAPE, policy, batch=len(PROMPTS), capacity=n, block=T)

    def rows(x, at):  # [B, 1, ...]: row b's token at[b]
        return x[at][:, None]

    lengths = np.array(PROMPTS)
    whole = [np.broadcast_to(x[: PROMPTS[-1]], (len(PROMPTS), PROMPTS[-1], *x.shape[1:])) for x in (k, v)]
    cache = decode.advance(decode.append(cache, 0, *whole, lengths), lengths)

    k_rot, q_rot = rotated(k), rotated(q)
    states = [[Streaming(bits, R) for _ in range(K)] for _ in lengths]
    for row, length in enumerate(lengths):
        for head in range(K):
            states[row][head].prefill(k_rot[:length, head], v[:length, head])

    @jax.jit
    def step(cache, k, v, q):
        cache = decode.append(cache, 0, k, v)
        out = decode.attend(cache, 0, q)
        return out, decode.advance(cache)

    by_length: dict[int, list[np.ndarray]] = {}
    for i in range(STEPS):
        at = lengths + i
        out, cache = step(cache, rows(k, at), rows(v, at), rows(q, at))
        out = np.asarray(out)[:, 0]
        for row in range(len(PROMPTS)):
            total = int(at[row]) + 1
            by_length.setdefault(total, []).append(out[row])
            for head in range(K * G):
                state = states[row][head // G]
                if head % G == 0:
                    first = state.step(q_rot[at[row], head], k_rot[at[row], head // G], v[at[row], head // G])
                    np.testing.assert_allclose(out[row, head], first, atol=2e-5)
            assert state.seen == (R * ((total - 1) // R), max(0, total - 1 - R))
    for outs in by_length.values():  # as many tokens, whatever of them was the prompt: the same attention
        for other in outs[1:]:
            np.testing.assert_allclose(other, outs[0], atol=2e-6)


@pytest.mark.parametrize(("window", "k_run", "v_exact"), [(128, 128, 129), (512, 512, 513), (32, 32, 33), (0, 32, 0)])
def test_windows(window, k_run, v_exact):
    """Seen as stored by the step that makes n tokens: R * floor((n - 1) / R) keys, max(0, n - 1 - R) values."""
    preset = named(f"kivi2-w{window}")
    assert (preset.k_window, preset.v_window) == (k_run, v_exact)
    policy = make_policy(preset, 1, K, 64)
    shape = decode.CacheShape(1, K, K, 64, make_rope(64, 256))
    cache = jax.eval_shape(lambda: decode.init_cache(shape, policy, batch=1, capacity=2048))
    token = np.arange(1500)
    for n in (1, 31, 32, 33, 128, 129, 130, 513, 514, 641, 1025, 1500):
        query = np.int32(n - 1)
        part = cache.segments[0]
        seen_k = seen_stored(cache, part.k_codec, cache.k_window, query, token)
        seen_v = seen_stored(cache, part.v_codec, cache.v_window, query, token)
        stored_k, stored_v = k_run * ((n - 1) // k_run), max(0, n - 1 - window) if window else n
        assert np.asarray(seen_k)[:n].sum() == stored_k
        assert (n if seen_v is None else np.asarray(seen_v)[:n].sum()) == stored_v
        # What is sealed before the step is seen as stored in it: storage never runs ahead of the paper's state.
        sealed = max(0, n - 1 - cache.window) // cache.block * cache.block
        assert sealed <= min(stored_k, stored_v)


def allocated(name, tokens, block=128):
    shape = decode.CacheShape(32, 32, 32, 128, make_rope(128, 4096))
    policy = make_policy(named(name), 32, 32, 128)
    return jax.eval_shape(
        lambda: decode.init_cache(shape, policy, batch=1, capacity=tokens, dtype="float16", block=block)
    )


@pytest.mark.parametrize(("name", "bits"), [("kivi2", 3.0), ("kivi4", 5.0), ("kivi1", 2.0), ("kivi2-g128", 2.25)])
def test_true_bits(name, bits):
    """Codes, and 32 bits of scale and zero for each group."""
    assert decode.bits_per_element(allocated(name, 131072)) == bits


@pytest.mark.parametrize(("tokens", "block", "saving"), [(4096, 32, 4.5), (4096, 128, 4.0), (131072, 128, 5.2)])
def test_bytes_of_kivi2(tokens, block, saving):
    """All there is, against the same tokens in float16: smaller blocks keep fewer tokens waiting in the ring."""
    cache = allocated("kivi2", tokens, block)
    width = 2 * 32 * 32 * 128  # elements per token
    blocks, ring = -(-(tokens - 129) // block), -(-(block - 1 + 129) // block) * block
    assert cache.capacity >= tokens
    wanted = width * (blocks * block * 3 + ring * 16) // 8
    small = decode.nbytes(cache) - wanted  # the pending token, counters, rotary frequencies
    assert 0 <= small < 20 * width
    assert decode.nbytes(cache) < 2 * width * tokens / saving
