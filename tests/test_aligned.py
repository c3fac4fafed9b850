"""Attention that reads keys and values in part, against a float64 oracle that reads, decides and counts by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy, random_kv
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import decode
from kvjax.codecs import AffineCodec, AlignRule, IdentityCodec, IntPlanesCodec, NUQChannelCodec, PlanesCodec
from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward
from kvjax.model.rope import cos_sin, make_rope, rotate
from kvjax.model.weights import init_random
from kvjax.policy import Override, Preset, bind

L, B, K, H, T = 1, 3, 2, 32, 32
UNIT = 64


def planes(k, v, **more):
    return Preset(PlanesCodec("tokens", k), PlanesCodec("channels", v), **more)


PRESETS = {
    "criterion": planes(AlignRule(), AlignRule(scope="running", skip=True), sinks=1),
    "rms": planes(AlignRule("rms", 2.0**-4), AlignRule("rms", 2.0**-8, skip=True), sinks=2),
    "worst-running": planes(AlignRule("worst", 2.0**-3, "running", skip=True), AlignRule("worst", 2.0**-6, skip=True)),
    "keys-only": Preset(PlanesCodec("tokens", AlignRule("rms", 2.0**-3)), IdentityCodec("float32")),
    "values-only": Preset(IdentityCodec("float32"), PlanesCodec("channels", AlignRule("rms", 2.0**-6))),
    "int4": Preset(
        IntPlanesCodec(AffineCodec(4, 32, "tokens"), AlignRule("rms", 2.0**-1)),
        IntPlanesCodec(AffineCodec(4, 32, "channels"), AlignRule("rms", 2.0**-4, skip=True)),
    ),
}


# A plain implementation: numpy, float64, one query and one head at a time.


def biased(x):
    """The biased exponent of float16 numbers."""
    return (np.asarray(x, np.float16).view(np.uint16) >> 10 & 31).astype(int)


def floor_log2(x):
    return np.where(x == 0, -127, np.frexp(np.where(x == 0, 1.0, x))[1] - 1)


class Float16Side:
    """One kv head's keys or values of one block: what is read at each level, and how wrong that may be."""

    widths = (0, 8, 12, 16)
    plane_bits = (8, 4, 4)

    def __init__(self, codec, x):
        self.bits = x.astype(np.float16).view(np.uint16)
        self.axis = 0 if codec.along == "tokens" else 1
        criterion = codec.read.mode == "criterion"
        self.top = biased(x.astype(np.float16)).max(0 if codec.along == "tokens" or criterion else 1)
        self.meta_bits = 8 * self.top.size

    def faces(self):
        middle = (self.bits & 0xFFF0 | 8, self.bits & 0xFF00 | 0x80)
        return [np.zeros(self.bits.shape), *(b.astype(np.uint16).view(np.float16).astype(float) for b in middle[::-1]),
                self.bits.view(np.float16).astype(float)]  # fmt: skip

    @staticmethod
    def errors(top):
        e = np.maximum(top, 1)
        return np.where(top == 0, 2.0**-14, 2.0 ** (e - 14)), 2.0 ** (e - 25 + 7), 2.0 ** (e - 25 + 3)


class Int4Side:
    widths = (0, 2, 4)
    plane_bits = (2, 2)

    def __init__(self, codec, x):
        block = codec.codes.quantize(x[None])
        self.code = np.asarray(block.codes)[0].astype(int)
        scale, zero = (np.repeat(np.asarray(m, float)[0], 32, axis=0) for m in (block.scale, block.zero))
        self.scale, self.zero = (scale, zero) if codec.along == "tokens" else (scale.T, zero.T)
        axis = 0 if codec.along == "tokens" else 1
        self.top = (self.scale.max(axis), np.maximum(abs(self.zero), abs(self.zero + 15 * self.scale)).max(axis))
        self.meta_bits = 2 * 16 * self.code.size // 32

    def faces(self):
        halves = self.code // 4 * 4 + 1.5
        return [np.zeros(self.code.shape), halves * self.scale + self.zero, self.code * self.scale + self.zero]

    @staticmethod
    def errors(top):
        return top[1], 1.5 * top[0]


def side_of(codec):
    return Int4Side if isinstance(codec, IntPlanesCodec) else Float16Side


def by_criterion(rule, dropped):
    lowest = 0 if rule.skip else 1
    return np.where(dropped < 4, 3, np.where(dropped < 8, 2, np.where(dropped < 11, 1, lowest)))


def by_budget(rule, tau, weight, total, count, errors):
    share = 1 / count + weight / max(total, 1e-30)
    if rule.mode == "worst":
        limits = [tau * share / 2] * len(errors)
    else:
        part = 0.25 if rule.skip else 0
        limits = [part * tau * share / 2] + [(1 - part) * tau * np.sqrt(share / 6)] * (len(errors) - 1)
    level = np.full(np.broadcast(share, errors[0]).shape, len(errors))
    for i in reversed(range(0 if rule.skip else 1, len(errors))):
        level = np.where(weight * errors[i] <= limits[i], i, level)
    return level


def units(level, rows):
    """Bits of the 64-byte units in which a row to be read lies; a plane's rows follow each other, head by head.

    `level[K, R]`; `rows`: of each plane, how many of the R lie in one row, and its bits.
    """
    total = 0
    for plane, (shared, bits) in enumerate(rows):
        wanted = (level > plane).reshape(len(level), shared, -1).any(1).ravel()
        wanted = np.repeat(wanted, bits // 8)  # by byte
        total += 8 * UNIT * sum(wanted[at : at + UNIT].any() for at in range(0, len(wanted), UNIT))
    return total


def rounded(bits):
    return -(-bits // (8 * UNIT)) * 8 * UNIT


def oracle(preset, k, v, q, G):
    """Outputs `[n, K*G, H]` and counters `[n, 6]` of every query of a row, each as a decode step.

    k (rotated), v `[n, K, H]`, q (rotated, scaled) `[n, K*G, H]`.
    """
    n, s = len(k), preset.sinks
    out, counts = np.zeros((n, k.shape[1] * G, H)), np.zeros((n, 6))
    blocks = (n - s) // T
    sides = {}
    for name, codec, x in (("k", preset.keys, k), ("v", preset.values, v)):
        if codec.reads_in_part:
            cut = x[s : s + blocks * T].reshape(max(blocks, 0), T, K, H) if blocks > 0 else []
            sides[name] = [[side_of(codec)(codec, b[:, h]) for h in range(K)] for b in cut]
    for i in range(n):
        sealed = max(i - s, 0) // T
        if not sealed:
            for head in range(K * G):
                out[i, head] = attend(q[i, head] @ k[: i + 1, head // G].T, v[: i + 1, head // G])
            continue
        k_level, v_level = step_levels(preset, sides, k, v, q[i], G, i, sealed, out[i], counts[i])
        for name, at, levels in (("k", 0, k_level), ("v", 3, v_level)):
            counts[i, at] = sealed * T * K * H
            if levels is None:
                counts[i, at + 1 : at + 3] += sealed * 32 * T * K * H  # float32 as it is
                continue
            codec = getattr(preset, "keys" if name == "k" else "values")
            side = side_of(codec)
            row = T if name == "k" else H
            for b in range(sealed):
                counts[i, at + 1] += sum(np.take(side.widths, levels[b][h]).sum() * row for h in range(K))
                every = np.stack([levels[b][h] for h in range(K)])
                # A channel's words are neighbours; a row of values' words holds tokens from all over the block.
                rows = [(1, T * bits) if name == "k" else (32 // bits, 32 * H) for bits in side.plane_bits]
                counts[i, at + 2] += units(every, rows)
            parts = 1 if side is Float16Side else 2
            meta = sum(sides[name][0][h].meta_bits for h in range(K))
            times = 1 if codec.read.scope == "running" and (name == "k" or codec.read.mode == "criterion") else sealed
            counts[i, at + 1] += times * meta
            counts[i, at + 2] += times * parts * rounded(meta // parts)
    return out, counts


def attend(scores, values):
    p = np.exp(scores - scores.max())
    return p @ values / p.sum()


def step_levels(preset, sides, k, v, q, G, i, sealed, out, counts):
    """Levels of keys `[block][head][H]` and values `[block][head][T]`, None where all is read; writes the output."""
    s = preset.sinks
    exact = [*range(s), *range(s + sealed * T, i + 1)]
    k_level = v_level = None
    read_k = [[k[s + b * T : s + (b + 1) * T, h] for h in range(K)] for b in range(sealed)]
    if "k" in sides:
        rule, side, k_level = preset.keys.read, side_of(preset.keys), []
        for b in range(sealed):
            k_level.append([])
            for h in range(K):
                tops = [sides["k"][c][h].top for c in (range(sealed) if rule.scope == "running" else [b])]
                top = np.max(tops, 0)
                levels = []
                for query in q[h * G : (h + 1) * G]:
                    if rule.mode == "criterion":
                        product = floor_log2(query) + np.maximum(top, 1)
                        levels.append(by_criterion(rule, product.max() - product))
                    else:
                        w = abs(query)
                        levels.append(by_budget(rule, rule.budget, w, w.sum(), H, side.errors(top)))
                k_level[b].append(np.max(levels, 0))
                read_k[b][h] = np.choose(k_level[b][h][None, :], sides["k"][b][h].faces())
    for head in range(K * G):
        h = head // G
        start = q[head] @ k[exact, h].T
        scores = [q[head] @ read_k[b][h].T for b in range(sealed)]
        everything = np.concatenate([start, *scores])
        if head % G == 0:
            wanted = [np.zeros(T, int) for _ in range(sealed)]
        if "v" in sides:
            rule, side = preset.values.read, side_of(preset.values)
            if rule.mode == "criterion":
                p_all = np.exp(everything - everything.max())
                p_sealed = (p_all / p_all.sum())[len(start) :]
                best = [np.arange(sealed * T)[r::32][p_sealed[r::32].argmax()] for r in range(32)]
                o = np.zeros(H)
                for t in best:
                    bits = sides["v"][t // T][h].bits[t % T] & 0x7F00 | 0x80
                    o += p_sealed[t] * bits.astype(np.uint16).view(np.float16).astype(float)
                    counts[4] += 8 * H
                    row = 4 * H * (h * (T // 4) + t % (T // 4))
                    counts[5] += 8 * UNIT * ((row + 4 * H - 1) // UNIT - row // UNIT + 1)
            seen = list(start)
            for b in range(sealed):
                seen += list(scores[b])
                if rule.mode == "criterion":
                    tops = [sides["v"][c][h].top for c in (range(sealed) if rule.scope == "running" else [b])]
                    base = (floor_log2(o) + 15 - np.maximum(np.max(tops, 0), 1)).min()
                    level = by_criterion(rule, base - floor_log2(p_sealed[b * T : (b + 1) * T]))
                else:
                    so_far = np.array(seen)
                    p_hat = np.exp(scores[b] - so_far.max()) / np.exp(so_far - so_far.max()).sum()
                    unit = max(side.errors(sides["v"][c][h].top)[0].max() for c in range(sealed))
                    errors = side.errors(sides["v"][b][h].top)
                    level = by_budget(rule, rule.budget * unit, p_hat, 1.0, i + 1, errors)
                wanted[b] = np.maximum(wanted[b], level)
        if head % G == G - 1:
            if "v" in sides:
                v_level = [[] for _ in range(sealed)] if v_level is None else v_level
                for b in range(sealed):
                    v_level[b].append(wanted[b])
                read_v = [np.choose(wanted[b][:, None], sides["v"][b][h].faces()) for b in range(sealed)]
            else:
                read_v = [v[s + b * T : s + (b + 1) * T, h] for b in range(sealed)]
            for each in range(h * G, (h + 1) * G):
                all_scores = np.concatenate(
                    [q[each] @ k[exact, h].T, *(q[each] @ read_k[b][h].T for b in range(sealed))]
                )
                out[each] = attend(all_scores, np.concatenate([v[exact, h], *read_v]))
    return k_level, v_level


def recorded(n, G, seed=0):
    rng = np.random.default_rng(seed)
    return (
        random_kv(rng, L, B, n, K, H),
        random_kv(rng, L, B, n, K, H),
        2 * rng.normal(size=(L, B, n, K * G, H)).astype("f4"),
    )


def feed(preset, k, v, q, sizes, lengths, G, most=None, sliding_window=None):
    """Outputs `[L, B, n, K*G, H]` and the cache after calls padded to `sizes`, of at most `most` tokens of each row."""
    shape = decode.CacheShape(L, K * G, K, H, make_rope(H, 2048), sliding_window)
    policy = make_policy(preset, L, K, H)
    cache = decode.init_cache(shape, policy, batch=B, capacity=k.shape[2] + T, block=T)
    done, outputs = np.zeros(B, int), np.zeros(q.shape)
    for call, size in enumerate(sizes):
        counts = np.minimum(lengths - done, size if most is None else most[call])
        index = np.minimum(done[:, None] + np.arange(size), k.shape[2] - 1)
        rows = np.arange(B)[:, None]
        for layer in range(L):
            cache = decode.append(cache, layer, k[layer][rows, index], v[layer][rows, index], counts)
            out, cache = decode.attend_and_count(cache, layer, q[layer][rows, index], counts)
            for b in range(B):
                outputs[layer, b, done[b] : done[b] + counts[b]] = out[b, : counts[b]]
        cache = decode.advance(cache, counts)
        done += counts
    assert (done == lengths).all()
    return outputs, cache


def rotated(x, n):
    """`x[n, heads, H]` after the cache's RoPE, float32."""
    cos, sin = cos_sin(make_rope(H, 2048), jnp.arange(n)[:, None], jnp.full((1, 1), n))
    return np.asarray(rotate(jnp.asarray(x[:n]), cos, sin))


GROUPS = {"keys-only": 1, "rms": 4}  # query heads per kv head; 2 where not named


@pytest.mark.parametrize("name", PRESETS)
def test_outputs_and_counters_are_the_oracles(name):
    """Rows of different lengths, in chunks and in chunks of one: what one query at a time reads, decides and counts."""
    G, lengths = GROUPS.get(name, 2), np.array([75, 66, 33])
    k, v, q = recorded(75, G)
    out, cache = feed(PRESETS[name], k, v, q, [40, 40, 40], lengths, G, most=[(40, 33, 33), (1, 33, 0), (34, 0, 0)])
    check_oracle(name, out, cache, k, v, q, lengths, G)


def test_decode_steps_are_the_oracles():
    lengths = np.array([70, 66, 33])
    k, v, q = recorded(70, 2)
    out, cache = feed(PRESETS["criterion"], k, v, q, [1] * 70, lengths, 2)
    check_oracle("criterion", out, cache, k, v, q, lengths, 2)


def check_oracle(name, out, cache, k, v, q, lengths, G):
    for b, n in enumerate(lengths):
        scaled = rotated(q[0, b], n) / np.float32(np.sqrt(H))
        wanted, counts = oracle(PRESETS[name], rotated(k[0, b], n), v[0, b, :n], scaled, G)
        np.testing.assert_allclose(out[0, b, :n], wanted, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(np.asarray(cache.segments[0].reads)[0, b], counts.sum(0), rtol=2e-3)
    read = decode.bits_read(cache)
    total = np.asarray(cache.segments[0].reads, float).sum((0, 1))
    np.testing.assert_allclose(read["all"], (total[1] + total[4]) / (total[0] + total[3]), rtol=1e-6)
    assert all(read[side] <= read[f"{side}_units"] for side in ("keys", "values", "all"))


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_worst_case_budget_is_never_exceeded(seed, spread):
    """|o - exact| <= tau_v * the largest value's power of two + (e^(2 tau_k) - 1) max |v|, against float64."""
    preset = planes(AlignRule("worst", 2.0**-5), AlignRule("worst", 2.0**-7, skip=True))
    lengths = np.array([75, 66, 33])
    k, v, q = recorded(75, 2, seed)
    out, _ = feed(preset, k, v, spread * q, [40, 40], lengths, 2)
    for b, n in enumerate(lengths):
        keys, queries = (rotated(x[0, b], n) for x in (k, spread * q))
        keys, values = (x.astype(np.float16).astype(float) for x in (keys, v[0, b, :n]))
        largest = np.abs(values).max((0, 2))
        for i in range(n):
            for head in range(2 * K):
                h = head // 2
                wanted = attend(queries[i, head] @ keys[: i + 1, h].T / np.sqrt(H), values[: i + 1, h])
                allowed = 2.0**-7 * 2 * largest[h] + np.expm1(2 * 2.0**-5) * largest[h]
                # Tokens that are not sealed yet were compared as float16 but used as float32: 2^-11 of them.
                assert np.abs(out[0, b, i, head] - wanted).max() <= allowed + 4e-3 * largest[h]


def test_beside_keys_before_rope_a_sliding_window_and_runs_of_blocks():
    """KVQuant's keys beside planes that are read entirely: what the general path gives with float32 values."""
    keys = NUQChannelCodec(bits=3, outliers=0.01, pre_rope=True)
    lengths = np.array([140, 100, 33])
    k, v, q = recorded(140, 2)
    v = v.astype(np.float16).astype("f4")
    out = []
    for values in (PlanesCodec("channels", AlignRule("worst", 1e-9)), IdentityCodec("float32")):
        preset = Preset(keys, values, sinks=1, v_window=2 * T)
        got, cache = feed(preset, k, v, q, [50] * 3, lengths, 2, sliding_window=70)
        out.append(got)
        assert cache.window == 2 * T if values.token_local else T
    np.testing.assert_allclose(*out, atol=1e-5)


def test_crop_and_fork_carry_the_counters_and_other_methods_have_none():
    k, v, q = recorded(75, 2)
    _, cache = feed(PRESETS["keys-only"], k, v, q, [40, 40, 40], np.array([75, 66, 33]), 2)
    counters = np.asarray(cache.segments[0].reads)
    np.testing.assert_array_equal(decode.fork(cache, [2, 0]).segments[0].reads, counters[:, [2, 0]])
    np.testing.assert_array_equal(decode.crop(cache, [64, 64, 32]).segments[0].reads, counters)
    shape = decode.CacheShape(L, 2 * K, K, H, make_rope(H, 2048))
    plain = Preset(IdentityCodec("float32"), IdentityCodec("float32"))
    plain_cache = decode.init_cache(shape, make_policy(plain, L, K, H), batch=B, capacity=T, block=T)
    assert plain_cache.segments[0].reads is None and decode.bits_read(plain_cache) is None
    fresh = decode.init_cache(shape, make_policy(PRESETS["rms"], L, K, H), batch=B, capacity=T, block=T)
    assert decode.bits_read(fresh) is None


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=16, vocab=97)
    return init_random(config, make_rope(16, 2048), seed=0, dtype=jnp.bfloat16)


def test_what_leaves_float16_is_an_error_that_names_the_row(model):
    """A bfloat16 model whose values reach 1e5: told when their block has sealed, by prefill or by the next step."""
    policy = bind("alignedkv", planes(AlignRule(), AlignRule()), 2)
    large = jax.tree_util.tree_map_with_path(
        lambda path, x: x * jnp.bfloat16(1e6) if jax.tree_util.keystr(path) == ".state['v']" else x, model
    )
    tokens = np.random.default_rng(0).integers(0, 97, (2, 32))
    cache = decode.init_cache(large, policy, batch=2, capacity=64, block=32)
    message = r"`policy` 'alignedkv' stores float16, but \d+ keys and values of row 1"
    with pytest.raises(ValueError, match=message):
        decode.prefill(large, cache, tokens, [1, 32])
    cache = decode.init_cache(model, policy, batch=2, capacity=64, block=32)
    segment = cache.segments[0]
    sealed = dataclasses.replace(segment, dropped=segment.dropped.at[1, 1, 0].set(3))  # as a step leaves it
    with pytest.raises(ValueError, match=message):
        decode.step(model, dataclasses.replace(cache, segments=(sealed,)), tokens[:, 0])


def test_layers_with_and_without_planes_side_by_side(model):
    """Counters belong to their layers, and planes that are read entirely change nothing."""
    everything = AlignRule("worst", 1e-9)
    mixed = Preset(
        PlanesCodec("tokens", everything),
        PlanesCodec("channels", everything),
        overrides=(Override((1,), IdentityCodec("float16"), IdentityCodec("float16")),),
    )
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
    cache = decode.init_cache(model, bind("mixed", mixed, 2), batch=2, capacity=64, block=32)
    logits, cache = decode.score(model, cache, tokens)
    np.testing.assert_allclose(logits, forward(model, tokens), atol=2e-2)
    assert [s.reads is None for s in cache.segments] == [False, True]
    np.testing.assert_allclose(decode.bits_read(cache)["all"], 16 + (8 / 32 + 8 / 16) / 2)
