"""Caches spread over a mesh against the same on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy, random_kv

from kvjax import decode, sharding, striped
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import preset

K, H, T = 8, 32, 32
MESHES = {"8x1": "seq=8", "4x2": "seq=4,tensor=2", "2x2x2": "data=2,seq=2,tensor=2", "1x8": "tensor=8"}


def new_cache(model, name, mesh=None, capacity=800, batch=2):
    policy = make_policy(preset(name), 2, K, H, name)
    return decode.init_cache(model, policy, batch=batch, capacity=capacity, block=T, mesh=mesh)


def sealed_blocks(cache, row):
    """Leaves `[L, n, ...]` of a row's sealed blocks as integers, in the order of the context."""
    used = int(cache.sealed(cache.length)[row])
    for leaf in jax.tree.leaves([(s.k, s.v) for s in cache.segments]):
        leaf = np.asarray(leaf)
        leaf = leaf[:, row, striped.order(leaf.shape[2], cache.stripes)[:used]]
        yield leaf.view(f"uint{8 * leaf.dtype.itemsize}")


# Same keys and values in, same bits out


@jax.jit
def feed(cache, q, k, v, counts):
    """New tokens of both layers; what their queries see."""
    out = []
    for layer in range(2):
        cache = decode.append(cache, layer, k[layer], v[layer], counts)
        out.append(decode.attend(cache, layer, q[layer], counts))
    return jnp.stack(out), decode.advance(cache, counts)


def settled(cache, tokens):
    """With `pending` for calls of so many tokens, and arrays where a new cache says they are: one program."""
    pending = tuple(jnp.zeros((*x.shape[:3], tokens, H), x.dtype) for x in cache.pending)
    cache = dataclasses.replace(cache, pending=pending)
    return cache if cache.mesh is None else jax.device_put(cache, sharding.cache_shardings(cache))


@functools.cache
def fed(name, shape, settle=True):
    """Outputs of chunks of 40 tokens and of single ones, over rows of different lengths; and the cache.

    Unless it is `settled` before each call, the first call after a new cache or another number of tokens is a program
    of its own: as many again.
    """
    mesh = None if shape is None else sharding.make_mesh(MESHES.get(shape, shape))
    cache = new_cache(decode.CacheShape(2, 16, K, H, make_rope(H, 512)), name, mesh, capacity=330)
    rng = np.random.default_rng(0)
    outputs = []
    for counts in ([40, 40], [40, 5], [40, 40], [40, 7], [40, 40], [33, 40], [1, 1], [1, 0], [1, 1]):
        S = 40 if max(counts) > 1 else 1
        q, k, v = (jnp.asarray(random_kv(rng, 2, 2, S, heads, H)) for heads in (16, K, K))
        out, cache = feed(settled(cache, S) if settle else cache, q, k, v, jnp.asarray(counts, jnp.int32))
        valid = np.arange(S)[None, :] < np.array(counts)[:, None]
        outputs.append(np.asarray(out)[:, valid])
    return outputs, cache


FAMILIES = {
    "bf16": "4x2", "int4": "2x2x2", "fp8": "1x8", "kivi2": "4x2", "kvquant3": "2x2x2", "kvquant2-dense-qnorm": "8x1",
    "asymkv-1-0": "8x1", "nf4": "2x2x2",
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), FAMILIES.items())
def test_the_same_keys_and_values_give_the_same_bits_and_outputs(name, shape):
    settle = name != "bf16"  # what a call finds in `pending` does not depend on the storage
    wanted, plain = fed(name, None, settle)
    got, cache = fed(name, shape, settle)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    for row in range(2):
        for a, b in zip(sealed_blocks(cache, row), sealed_blocks(plain, row), strict=True):
            np.testing.assert_array_equal(a, b)
    assert [s.dropped.tolist() for s in cache.segments] == [s.dropped.tolist() for s in plain.segments]


# The model

# Weights so small that attention does not multiply the last bit of a sum.
CONFIG = ModelConfig(2, 64, 64, 16, K, H, 64, initializer_range=0.1)
STEPS = 300


def run(mesh, attention, steps):
    """A prompt, a second turn behind it, and decode steps with kvquant3: all logits, and the cache."""
    model = init_random(CONFIG, make_rope(H, 1024), seed=0)
    if mesh is not None:
        model = sharding.shard_model(model, mesh)
    rng = np.random.default_rng(0)
    cache = new_cache(model, "kvquant3", mesh)
    prompt, turn = (rng.integers(0, 64, (2, n)) for n in (250, 200))
    first, cache = decode.prefill(model, cache, prompt, np.array([250, 170]), attention)
    second, cache = decode.prefill(model, cache, turn, np.array([200, 3]), attention)
    tokens = rng.integers(0, 64, (2, steps)).astype(np.int32)
    # Unlike other programs of tests many steps run for longer than they compile.
    options = {"xla_backend_optimization_level": 1} if steps == STEPS else None
    score = cached.score.lower(model, cache, tokens).compile(options)
    logits, cache = score(model, cache, tokens)
    return np.concatenate([np.asarray(x) for x in (first[:, None], second[:, None], logits)], 1), cache


def test_prefill_and_300_steps_equal_those_of_one_device():
    wanted, plain = run(None, "exact", STEPS)
    positions = np.array([[250, 450, *range(451, 451 + STEPS)], [170, 173, *range(174, 174 + STEPS)]])
    same = 0  # rows of which no code differs
    for spec in MESHES.values():
        logits, cache = run(sharding.make_mesh(spec), "exact", STEPS)
        error = np.abs(logits - wanted).max(2) / np.abs(wanted).max()
        for row in range(2):
            # Sums in another order differ in the last bit, and now and then that bit makes a value's scale the next
            # float16, a single token then being stored up to 5e-4 off, or takes a number to the next level: as with any
            # change of summation on one device, and on one machine and not another.
            leaves = list(zip(sealed_blocks(cache, row), sealed_blocks(plain, row), strict=True))
            assert sum((a != b).sum() for a, b in leaves) <= sum(a.size for a, _ in leaves) / 500, spec
            codes = [(a != b).any((0, *range(2, a.ndim))) for a, b in leaves if a.dtype == np.uint32]
            differs = np.flatnonzero(np.any(codes, axis=0))
            same += differs.size == 0
            until = plain.sinks + T * differs[0] if differs.size else positions.max()
            before = error[row, positions[row] <= until]
            assert before.size == 0 or (np.median(before) < 1e-5 and before.max() < 1e-4), spec
            assert error[row].max() < 2e-3, spec
    assert same >= 6  # of eight


def test_prefill_through_the_cache():
    # Later layers are stored from sums in another order: now and then a value's scale is the next float16, as with
    # another size of chunk on one device.
    wanted, _ = run(None, "cached", 1)
    logits, _ = run(sharding.make_mesh(MESHES["4x2"]), "cached", 1)
    np.testing.assert_allclose(logits, wanted, atol=1e-3 * np.abs(wanted).max())


def compiled_step(name, mesh, capacity):
    model = sharding.shard_model(init_random(CONFIG, make_rope(H, 1024), seed=0), mesh)
    cache = new_cache(model, name, mesh, capacity)
    token = np.zeros(2, np.int32)
    return cached.step.lower(model, cache, token, token).compile(), cache


# All-reduces per layer of a step in which no block fills: two join the blocks of `seq`, two the heads and the MLP of
# `tensor`, one the vocabulary's embedding; values scaled over all heads also need their range.
@pytest.mark.parametrize(
    ("name", "shape", "reduces"),
    [("kivi2", "8x1", 2), ("int4", "2x2x2", 10), ("kvquant3", "4x2", 11), ("bf16", "1x8", 3)],
)
def test_a_step_moves_nothing_but_sums(name, shape, reduces):
    mesh = sharding.make_mesh(MESHES[shape])
    step, cache = compiled_step(name, mesh, 40000)
    moves = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", step.as_text())
    assert set(moves) == {"all-reduce"} and len(moves) <= reduces
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache)
    )  # updated in place
    larger, _ = compiled_step(name, mesh, 80000)
    assert larger.memory_analysis().temp_size_in_bytes <= memory.temp_size_in_bytes * 1.01


# Rows, and what is refused


@pytest.mark.parametrize("shape", ["4x2", "data=2,seq=2"])
def test_crop_and_fork_give_what_one_device_gives(shape):
    def cropped(shape):
        _, cache = fed("kvquant3", shape)
        cache = decode.crop(cache, np.array([150, 70]))  # opens a block of each row again
        return decode.fork(cache, [1, 0])

    plain, cache = cropped(None), cropped(shape)
    assert cache.length.tolist() == plain.length.tolist() == [70, 150]
    assert cache.frozen.tolist() == plain.frozen.tolist()
    for row in range(2):
        for a, b in zip(sealed_blocks(cache, row), sealed_blocks(plain, row), strict=True):
            np.testing.assert_array_equal(a, b)
        held = int(plain.length[row] - plain.recent_start(plain.length)[row])
        for a, b in zip(cache.segments, plain.segments):
            np.testing.assert_array_equal(a.k_recent[:, row, :, :held], b.k_recent[:, row, :, :held])


def test_stripes_hold_every_block_once():
    for blocks, stripes in ((12, 4), (6, 1), (8, 8)):
        where = striped.order(blocks, stripes)
        assert sorted(where) == list(range(blocks))
        for index in range(stripes):
            stripe = striped.Stripe(index, stripes)
            for used in range(blocks + 1):
                own = [n for n in range(used) if n % stripes == index]
                assert int(stripe.among(jnp.int32(used))) == len(own)
                assert [stripe.number(i) for i in range(len(own))] == own
                assert [where[n] for n in own] == [index * blocks // stripes + i for i in range(len(own))]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sharding.make_mesh("seq=9"), "`mesh=seq=9` needs 9 devices, but there are 8"),
        (lambda: sharding.make_mesh("sequence=2"), "'sequence=2' must be data=N, seq=N or tensor=N"),
        (lambda: sharding.make_mesh("seq=0"), "'seq=0' must be data=N"),
        (lambda: on("tensor=3"), "tensor=3 must divide the 8 of kv heads"),
        (lambda: on("data=4"), "data=4 must divide the 2 of batch"),
        (lambda: on("seq=2", "alignedkv"), "use seq=1"),
    ],
)
def test_refusals_name_what_came_and_the_way_out(make, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        make()


def on(spec, name="int4"):
    shape = decode.CacheShape(2, 16, K, H, make_rope(H, 512))
    return new_cache(shape, name, sharding.make_mesh(spec))
