"""The cache: same K/V, same bits, however they come; attention against a float64 oracle that knows no cache."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import make_policy, random_kv
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import decode
from kvjax.codecs import IdentityCodec, NUQChannelCodec, NUQTokenCodec
from kvjax.model.rope import make_rope
from kvjax.policy import Preset
from kvjax.presets import kivi

L, B, K, G, H, T = 2, 3, 2, 2, 16, 32
CAPACITY = 160
SHAPE = decode.CacheShape(L, K * G, K, H, make_rope(H, 2048))
KVQUANT = Preset(NUQChannelCodec(bits=3, outliers=0.01, pre_rope=True), NUQTokenCodec(bits=3, outliers=0.01), sinks=1)
PRESETS = {
    "bf16": Preset(IdentityCodec(), IdentityCodec()),
    "kvquant": KVQUANT,
    "windowed": dataclasses.replace(KVQUANT, sinks=3, k_window=20, v_window=20),
    # Keys with statistics over a block, as in KIVI: exact until their block is full.
    "grouped": Preset(
        NUQChannelCodec(bits=4, table="uniform", ranges="block", pre_rope=True),
        NUQTokenCodec(bits=4, table="uniform"),
        sinks=2,
        v_window=T,
    ),
}
# KIVI's two windows, shorter and longer than a block, in groups of 16 tokens.
PRESETS["kivi"] = kivi(2, group=16, window=16)
PRESETS["kivi-long"] = dataclasses.replace(kivi(4, group=16, window=2 * T), sinks=1)
presets = pytest.mark.parametrize("name", list(PRESETS))
PRESETS["grouped-no-window"] = dataclasses.replace(PRESETS["grouped"], sinks=0, v_window=0)


def make(name, shape=SHAPE, capacity=CAPACITY):
    policy = make_policy(PRESETS[name], L, K, H)
    return decode.init_cache(shape, policy, batch=B, capacity=capacity, block=T)


def recorded(n, seed=0):
    rng = np.random.default_rng(seed)
    return (
        random_kv(rng, L, B, n, K, H),
        random_kv(rng, L, B, n, K, H),
        rng.normal(size=(L, B, n, K * G, H)).astype("f4"),
    )


def window_of(x, start, size):
    """Rows `start[b] .. start[b] + size` of `x[B, n, ...]`, clipped at the end."""
    index = np.minimum(start[:, None] + np.arange(size), x.shape[1] - 1)
    return np.stack([row[i] for row, i in zip(x, index, strict=True)])


def feed(cache, k, v, sizes, lengths, q=None):
    """Feeds `lengths[b]` tokens of each row in calls of the given padded sizes; with q, also collects attention."""
    done = np.zeros(B, int)
    outputs = np.full((*q.shape[:2], q.shape[2], K * G, H), np.nan) if q is not None else None
    for size in sizes:
        counts = np.minimum(size, lengths - done)
        for layer in range(L):
            cache = decode.append(
                cache, layer, window_of(k[layer], done, size), window_of(v[layer], done, size), counts
            )
            if q is not None:
                out = decode.attend(cache, layer, window_of(q[layer], done, size), counts)
                for b in range(B):
                    outputs[layer, b, done[b] : done[b] + counts[b]] = out[b, : counts[b]]
        cache = decode.advance(cache, counts)
        done = done + counts
    assert (done == lengths).all()
    return cache, outputs


def stored(cache):
    """What counts of a cache: sealed blocks, sinks, and the recent tokens that are there."""
    out = [np.asarray(cache.length)]
    held = np.asarray(cache.length - cache.recent_start(cache.length))
    for segment in cache.segments:
        out += [np.asarray(leaf) for leaf in jax.tree.leaves((segment.k, segment.v))]
        for recent in (segment.k_recent, segment.v_recent):
            out += [np.asarray(recent)[:, b, :, : max(held[b], 0)] for b in range(B)]
        for sinks in (segment.k_sinks, segment.v_sinks):
            out += [np.asarray(sinks)[:, b, :, : int(cache.length[b])] for b in range(B)]
    return out


def assert_same_bits(a, b):
    for x, y in zip(stored(a), stored(b), strict=True):
        np.testing.assert_array_equal(x, y)


SIZES = (1, 45, 130)  # each compiles once


@presets
@settings(max_examples=5)
@given(data=st.data())
def test_same_bits_however_the_tokens_come(name, data):
    """Rows of different lengths around block boundaries, cut in any calls, equal one append (and one by one)."""
    edges = [1, T - 1, T, T + 1, 2 * T, 2 * T + 1, 3 * T + 5, 130]
    lengths = np.array([data.draw(st.sampled_from(edges)) for _ in range(B)])
    k, v, _ = recorded(130)
    whole, _ = feed(make(name), k, v, [130], lengths)
    done, sizes = 0, []
    while done < lengths.max():
        sizes.append(data.draw(st.sampled_from(SIZES)))
        done += sizes[-1]
    pieces, _ = feed(make(name), k, v, sizes, lengths)
    assert_same_bits(whole, pieces)


@presets
def test_one_by_one_equals_at_once(name):
    lengths = np.array([T + 2, T, 2 * T + 3])
    k, v, _ = recorded(130)
    whole, _ = feed(make(name), k, v, [130], lengths)
    single, _ = feed(make(name), k, v, [1] * lengths.max(), lengths)
    assert_same_bits(whole, single)


def rotate64(x, positions):
    angle = positions[..., None] * np.asarray(SHAPE.rope.inv_freq, np.float64)
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def oracle(preset, k, v, q, params, sliding_window=None):
    """float64 attention of one row and layer: which face of each token each query sees, straight from design.md."""
    n, s = k.shape[0], preset.sinks
    at = np.arange(n)
    stored_k, stored_v = k.astype(np.float64).copy(), v.astype(np.float64).copy()
    if not preset.keys.pre_rope:
        k = rotate64(k, at[:, None]).astype(np.float32)
        stored_k = k.astype(np.float64).copy()
    padded = -(-(n - s) // T) * T
    for codec, x, out, p in ((preset.keys, k, stored_k, params[0]), (preset.values, v, stored_v, params[1])):
        if n > s:
            blocks = np.concatenate([x[s:], np.zeros((padded - n + s, K, H), np.float32)])
            blocks = blocks.reshape(-1, T, K, H).swapaxes(1, 2)
            out[s:] = np.asarray(codec.roundtrip(blocks, p)).swapaxes(1, 2).reshape(-1, K, H)[: n - s]

    def sees_stored(codec, w):
        query, token = at[:, None], at[None, :]
        if codec.token_local:
            mask = token <= query - w if w else np.ones((n, n), bool)
        else:
            run = w or T
            mask = ((token - s) // run + 1) * run + s <= query
        return mask & (token >= s)

    faces = [k.astype(np.float64), stored_k]
    if preset.keys.pre_rope:
        faces = [rotate64(x, at[:, None]) for x in faces]
    visible = at[None, :] <= at[:, None]
    if sliding_window:
        visible &= at[:, None] - at[None, :] < sliding_window
    queries = rotate64(q, at[:, None]) / np.sqrt(H)
    out = np.zeros((n, K * G, H))
    for h in range(K * G):
        exact, coded = (queries[:, h] @ x[:, h // G].T for x in faces)
        scores = np.where(visible, np.where(sees_stored(preset.keys, preset.k_window), coded, exact), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mask = sees_stored(preset.values, preset.v_window)
        out[:, h] = (p * mask) @ stored_v[:, h // G] + (p * ~mask) @ v[:, h // G].astype(np.float64)
    return out


def check_oracle(name, sizes, lengths, sliding_window=None):
    k, v, q = recorded(130)
    preset, policy = PRESETS[name], make_policy(PRESETS[name], L, K, H)
    shape = dataclasses.replace(SHAPE, sliding_window=sliding_window)
    _, got = feed(make(name, shape), k, v, sizes, lengths, q)
    part = policy.segments[0]
    for layer in range(L):
        params = jax.tree.map(lambda p, layer=layer: p[layer], (part.k_params, part.v_params))
        for b in range(B):
            n = lengths[b]
            wanted = oracle(preset, k[layer, b, :n], v[layer, b, :n], q[layer, b, :n], params, sliding_window)
            # bf16 storage rounds differently from the oracle's, by at most one bit of 8.
            tolerance = 2e-2 if name == "bf16" else 2e-4
            np.testing.assert_allclose(got[layer, b, :n], wanted, rtol=tolerance, atol=tolerance)


@presets
def test_attention_equals_the_oracle_for_chunks_and_steps(name):
    check_oracle(name, [45, 1, 1, 45, 45], np.array([130, T + 14, 2 * T]))


@pytest.mark.parametrize("name", ["kvquant"])
def test_sliding_window_hides_old_blocks(name):
    check_oracle(name, [45, 45, 1, 45], np.array([130, T + 14, 2 * T]), sliding_window=37)


@presets
def test_rows_do_not_depend_on_each_other(name):
    k, v, q = recorded(70)
    other_k, other_v, other_q = recorded(70, seed=1)
    lengths, others = np.array([70, 40, 65]), np.array([70, 66, 3])
    mixed = [np.stack([a[:, 0], b[:, 1], b[:, 2]], 1) for a, b in ((k, other_k), (v, other_v), (q, other_q))]
    one, out_one = feed(make(name), k, v, [45, 45], lengths, q)
    two, out_two = feed(make(name), mixed[0], mixed[1], [45, 45], others, mixed[2])
    np.testing.assert_array_equal(out_one[:, 0, :70], out_two[:, 0, :70])
    for x, y in zip(jax.tree.leaves(one.segments[0].k), jax.tree.leaves(two.segments[0].k), strict=True):
        np.testing.assert_array_equal(x[:, 0], y[:, 0])


@pytest.mark.parametrize("name", ["bf16", "kvquant", "windowed"])
@pytest.mark.parametrize("kept", [0, 1, 20, T, T + 1, 2 * T - 1])
def test_crop_then_append_stores_what_never_having_had_them_does(name, kept):
    k, v, _ = recorded(130)
    lengths = np.array([130, 100, 3 * T + 1])
    full, _ = feed(make(name), k, v, [130], lengths)
    cropped = decode.crop(full, np.full(B, kept))
    assert cropped.length.tolist() == [kept] * B
    rest = [x[:, :, kept:] for x in (k, v)]
    again, _ = feed(cropped, *rest, [130], lengths - kept)
    for x, y in zip(
        jax.tree.leaves((full.segments[0].k, full.segments[0].v)),
        jax.tree.leaves((again.segments[0].k, again.segments[0].v)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_what_saturates_is_counted_when_it_is_stored_and_not_with_its_block_again():
    k, v, _ = recorded(130)
    v[0, 0, 5, 0, 0] = 1e6  # beyond float16
    preset = Preset(IdentityCodec("float16"), IdentityCodec("float16"))
    cache = decode.init_cache(SHAPE, make_policy(preset, L, K, H), batch=B, capacity=CAPACITY, block=T)
    for kept, count in ((0, 1), (20, 1), (4, 2)):  # the last stores it once more
        cache = decode.crop(cache, np.full(B, kept))
        cache, _ = feed(cache, k[:, :, kept:], v[:, :, kept:], [130], np.full(B, 130 - kept))
        assert decode.statistics(cache)["dropped_outliers"] == count


@pytest.mark.parametrize(
    ("name", "kept", "shorter"),
    [("grouped-no-window", 128, 32), ("grouped", 130, 2), ("kivi", 113, 0), ("kivi-long", 130, 1)],
)
def test_crop_of_a_grouped_block_says_where_it_can_be_cut(name, kept, shorter):
    k, v, _ = recorded(130)
    cache, _ = feed(make(name), k, v, [130], np.array([130, 100, 97]))
    with pytest.raises(ValueError, match=f"crop to {kept} or more, or to {shorter} and append the rest"):
        decode.crop(cache, [40, 100, 97])
    for length in (kept, shorter):
        assert decode.crop(cache, [length, 100, 97]).length.tolist() == [length, 100, 97]
    with pytest.raises(ValueError, match="would cut"):
        decode.crop(cache, [kept - 1, 100, 97])


def test_crop_to_any_length_that_cuts_no_block():
    k, v, _ = recorded(130)
    cache, _ = feed(make("grouped-no-window"), k, v, [130], np.array([130, 100, 97]))
    assert decode.crop(cache, [64, 98, 97]).length.tolist() == [64, 98, 97]
    with pytest.raises(ValueError, match="between 0 and"):
        decode.crop(cache, [131, 1, 1])


def test_fork_copies_every_leaf_and_shares_none():
    k, v, _ = recorded(70)
    cache, _ = feed(make("kvquant"), k, v, [45, 45], np.array([70, 40, 65]))
    forked = decode.fork(cache, [2, 0])
    assert forked.length.tolist() == [65, 70]
    for x, y in zip(jax.tree.leaves(cache.segments[0].k), jax.tree.leaves(forked.segments[0].k), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, [2, 0]], y)
    originals = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)}
    assert not originals & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(forked)}
    with pytest.raises(ValueError, match=r"rows 0 to 2"):
        decode.fork(cache, [3])


def test_a_full_row_is_an_error_that_loses_nothing_and_is_counted_under_jit():
    k, v, _ = recorded(130)
    cache = make("kvquant", capacity=90)
    capacity = cache.capacity
    cache, _ = feed(cache, k, v, [130], np.array([capacity, 50, 50]))
    one = np.array([1, 1, 1])
    for layer in range(L):
        cache = decode.append(cache, layer, k[layer, :, :1], v[layer, :, :1], one)
    with pytest.raises(ValueError, match=r"`capacity=97`.*row 0 holds 97 and would need 98"):
        decode.advance(cache, one)
    traced = jax.jit(decode.advance)(cache, one)
    assert traced.length.tolist() == [97, 51, 51]
    assert decode.statistics(traced)["overrun"] == 1
    for x, y in zip(jax.tree.leaves(cache.segments[0].k), jax.tree.leaves(traced.segments[0].k), strict=True):
        np.testing.assert_array_equal(x[:, 0], y[:, 0])


def test_bytes_are_counted_from_the_arrays():
    cache = make("kvquant")
    segment = cache.segments[0]
    blocks = segment.k.codes.shape[2]
    assert blocks * T + 1 == cache.capacity >= CAPACITY
    # Per token and head 16 channels at 3 bits and a slot of 24 bits, for K and V; 32 bits per token for V.
    wanted = ((3 * H + 24) * 2 * K + 32) / (2 * K * H)
    assert decode.bits_per_element(cache) == wanted
    assert decode.nbytes(cache) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "`batch=0`"),
        ({"capacity": 0}, "`capacity=0`"),
        ({"capacity": 10.5}, "`capacity=10.5` must be a number of tokens"),
        ({"capacity": 3_000_000_000}, "from 1 to 1073741823"),
        ({"dtype": "int32"}, "`dtype=int32` must be one of bfloat16, float16, float32"),
        ({"policy": "int4"}, r"`policy='int4'` is a name; pass kvjax.policy\('int4', model\)"),
        ({"model": dataclasses.replace(SHAPE, q_heads=3)}, "`q_heads=3` must be a multiple of `kv_heads=2`"),
        ({"model": dataclasses.replace(SHAPE, rope=make_rope(64, 2048))}, "`rope` turns 64 channels of a head, and"),
        ({"block": 48}, "`block=48` must be a positive multiple of 32"),
    ],
)
def test_sizes_that_make_no_cache(arguments, message):
    made_of = {"model": SHAPE, "policy": make_policy(KVQUANT, L, K, H), "batch": 1, "capacity": 64, "block": 32}
    with pytest.raises(ValueError, match=message):
        decode.init_cache(**made_of | arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: decode.append(c, L, x, x), f"`layer={L}` must lie between 0 and {L - 1}"),
        (lambda c, x: decode.append(c, -1, x, x), "`layer=-1` must"),
        (lambda c, x: decode.append(c, 0, x, x, [2, 0, 0]), r"`counts=\[2, 0, 0\]` must lie between 0 and 1"),
        (lambda c, x: decode.attend(c, L, np.repeat(x, G, 2)), f"`layer={L}` must"),
        (lambda c, x: decode.attend(c, 0, np.repeat(x, G, 2), attention="foo"), "`attention='foo'` must be"),
        (lambda c, x: decode.advance(c, [1, -3, 1]), r"`counts=\[1, -3, 1\]` must"),
        (
            lambda c, x: decode.advance(c, [1]),
            r"`counts` of shape \(1,\) and type int64 must be 3 integers, one per row",
        ),
        (lambda c, x: decode.crop(c, [0.0, 0.0, 0.0]), "`lengths` of shape .* and type float64 must be 3 integers"),
    ],
)
def test_what_is_no_call_on_the_cache_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make("bf16"), np.zeros((B, 1, K, H), np.float32))


def test_a_policy_for_another_shape_is_refused():
    with pytest.raises(ValueError, match="covers 3 layers"):
        decode.init_cache(SHAPE, make_policy(KVQUANT, 3, K, H), batch=1, capacity=64)
    with pytest.raises(ValueError, match="fitted to 2 kv heads of size 8"):
        decode.init_cache(SHAPE, make_policy(KVQUANT, L, K, 8), batch=1, capacity=64)


def test_a_cache_for_tpu_holds_the_same_bits_side_by_side():
    """Two heads of 64 as one: sealed, cropped inside a block and completed."""
    shape = dataclasses.replace(SHAPE, head_dim=64, rope=make_rope(64, 2048))
    k, v = random_kv(np.random.default_rng(0), 2, L, B, 80, K, 64)
    segments = []
    for target in ("cpu", "tpu:v5e"):
        policy = make_policy(KVQUANT, L, K, 64)
        cache = decode.init_cache(shape, policy, batch=B, capacity=CAPACITY, block=T, target=target)
        for counts, forgotten in (([80, 70, 31], 20), ([40, 5, 80], 0)):
            for layer in range(L):
                cache = decode.append(cache, layer, k[layer], v[layer], np.asarray(counts))
            cache = decode.advance(cache, np.asarray(counts))
            cache = decode.crop(cache, cache.length - forgotten)
        segments.append(cache.segments[0])
    plain, joined = segments
    for side in "kv":
        codec, storage = getattr(joined, f"{side}_codec"), getattr(joined, side)
        assert storage.codes.shape[3:] == (K // 2, T * 3 // 32, 128)
        for a, b in zip(jax.tree.leaves(codec.separate(storage)), jax.tree.leaves(getattr(plain, side)), strict=True):
            np.testing.assert_array_equal(a, b)
