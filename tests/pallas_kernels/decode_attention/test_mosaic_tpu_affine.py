"""The TPU kernel on uncompressed and affine storage, in the interpreters."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import packing
from pallas_kernels.decode_attention import api, specs, tpu_codes, tpu_plan, tpu_products

OLD, NEW = "v5e", "v6e"  # both multiply int8: matrix units 128 and 256 wide
BF16, ANY = "7x", ""  # bfloat16 products, of operands made by conversion and by integer operations

CASES = [
    ("bf16", "gqa3-h96", NEW),
    ("f16", "mqa16-h64", OLD),
    ("kivi8", "gqa2-h256", OLD),
    ("kivi4", "gqa4-h128", NEW),
    ("kivi4", "gqa4-h128", BF16),
    ("kivi4-g128", "gqa4-h128", OLD),
    ("kivi2", "gqa3-h128", ANY),
    ("kivi2-g64", "mha-h128", OLD),
    ("kivi1", "gqa4-h128", NEW),
    ("asymkv-k2v1", "mqa16-h128", OLD),
    ("int8", "gqa3-h128", OLD),
    ("int8", "gqa3-h128", ANY),
    ("int4", "gqa4-h128", NEW),
    ("bf16", "gqa4-h64", OLD),
    ("kivi4", "gqa4-h64", NEW),
    ("int4", "gqa16-h64", OLD),
    ("kivi4-g128", "gqa4-h64", BF16),
    ("kivi2", "mha-h96", OLD),
]


@functools.partial(jax.jit, static_argnames=("chip", "interpret"))
def attend(q, k, v, layer, first, last, *, chip, interpret=True):
    stored = kernel_cases.joined({"q": q, "k": k, "v": v, "rotation": None})
    rows = {"layer": layer, "first": first, "last": last}
    return api.decode_attention(**stored, **rows, implementation="mosaic_tpu", chip=chip, interpret=interpret)


def run(arguments, **kwargs):
    return attend(*(arguments[x] for x in ("q", "k", "v", "layer", "first", "last")), **kwargs)


def assert_close(cases, **kwargs):
    """Over the cases, errors at most twice those of the plain evaluation in bfloat16."""
    ours = [kernel_cases.errors(run(arguments, **kwargs), expected) for arguments, expected in cases]
    plain = [kernel_cases.errors(kernel_cases.low_precision(a, jnp.bfloat16), expected) for a, expected in cases]
    for error, bound in zip(np.max(ours, axis=0), np.max(plain, axis=0)):
        assert error <= 2 * bound + 1e-5, (ours, plain)


@pytest.mark.parametrize(("storage", "shape", "chip"), CASES)
def test_storage(storage, shape, chip):
    assert_close([kernel_cases.case(storage, shape, lengths) for lengths in specs.LENGTHS], chip=chip)


def test_rows_begin_anywhere():
    for first in (100, 128):
        lengths = ("T-1,T", "T+1,full", "full,0")
        assert_close([kernel_cases.case("kivi4", "gqa4-h128", x, first) for x in lengths], chip=NEW)


@pytest.mark.parametrize(
    ("keys", "values", "blocks", "group"),
    # The first has its sums in memory, the last ones have their metadata fetched in two windows and in one that moves.
    [
        ("affine4-tokens32", "affine4-channels32", 11, 16),
        *(("affine4-width", "affine4-channels128", blocks, 4) for blocks in (21, 48)),
    ],
)
def test_several_iterations_per_chunk_and_several_chunks(monkeypatch, keys, values, blocks, group):
    monkeypatch.setattr(tpu_plan, "UNROLLED_TOKENS", 256)
    monkeypatch.setattr(tpu_plan, "CHUNK_TOKENS", 512)
    shape = specs.Shape(1, 2, blocks, 1, group, 128)
    arguments, expected = large_case(keys, values, shape, [blocks * 128, 700])
    # Not through `attend`, which may have been traced for these shapes with other sizes.
    attend = functools.partial(api.decode_attention, implementation="mosaic_tpu", chip=NEW, interpret=True)
    partial = jax.jit(attend)(**arguments)
    error, log_error = kernel_cases.errors(partial, expected)
    plain = kernel_cases.errors(kernel_cases.low_precision(arguments, jnp.bfloat16), expected)
    assert error <= 2 * plain[0] and log_error <= 2 * plain[1]


def large_case(keys, values, shape, last):
    rng = np.random.default_rng(5)
    k, v, q = specs.make(keys, shape, rng), specs.make(values, shape, rng), specs.query(shape, rng)
    first, last = np.zeros(2, np.int32), np.asarray(last, np.int32)
    expected = kernel_cases.attend(q, k, v, 0, first, last)
    k, v, q, first, last = jax.tree.map(jnp.asarray, (k, v, q, first, last))
    return {"q": q, "k": k, "v": v, "layer": jnp.int32(0), "first": first, "last": last, "rotation": None}, expected


@pytest.mark.parametrize(("tokens", "chip"), [(512, NEW)])
def test_longer_blocks(tokens, chip):
    shape = specs.Shape(1, 2, 2, 1, 2, 128, tokens)
    arguments, expected = large_case("affine2-tokens32", "affine1-channels32", shape, [tokens + 7, 2 * tokens])
    error, _ = kernel_cases.errors(run(arguments, chip=chip), expected)
    assert error <= 2 * kernel_cases.errors(kernel_cases.low_precision(arguments, jnp.bfloat16), expected)[0]


@pytest.mark.parametrize(
    ("storage", "shape", "chip"), [("kivi2", "mha-h128", OLD), ("kivi2", "gqa4-h64", OLD), ("int4", "gqa3-h128", NEW)]
)
def test_on_a_simulated_tpu_with_race_detection(storage, shape, chip):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    try:
        cases = [kernel_cases.case(storage, shape, "T+1,full")]
        assert_close(cases, chip=chip, interpret=pltpu.InterpretParams(detect_races=True))
        assert not simulator.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("encoding", [tpu_codes.HalfWords, tpu_codes.Signed, tpu_codes.Bytes])
@pytest.mark.parametrize("tokens", [128, 256])
def test_operands_are_the_codes_in_their_order(bits, encoding, tokens):
    encoding, blocks = encoding(bits), 2
    words = np.random.default_rng(bits).integers(0, 2**32, (blocks, tokens * bits // 32, 8), dtype=np.uint32)
    codes = kernel_cases.unpack(words, bits).reshape(blocks * tokens, 8)[encoding.order(blocks, tokens)]

    def kernel(words, *out):
        for ref, operand in zip(out, encoding.operands(words[...])):
            ref[...] = operand

    dtype = jnp.int8 if encoding.integer else jnp.bfloat16
    out = [jax.ShapeDtypeStruct((blocks * tokens, 8), dtype)] * len(encoding.weights)
    operands = pl.pallas_call(kernel, out_shape=out, interpret=True)(jnp.asarray(words))
    held = sum(w * np.asarray(x, np.float64) for w, x in zip(encoding.weights, operands))
    np.testing.assert_array_equal(held, encoding.gain * (codes - encoding.middle) + encoding.offset)
    assert float(jnp.bfloat16(encoding.offset)) == encoding.offset


def integer_products(x, codes, largest):
    """Rows `x[8, 128]` times `codes[128, 128]` of 4 bits by bytes: as queries (transposed codes) and as weights."""
    encoding = tpu_codes.Bytes(4)
    queries = tpu_products.query_rows(encoding, 1, 8, 128)
    weights = tpu_products.weight_rows(encoding, 8, 128)
    order = encoding.order(1, 128)
    # Token order[i] at position i is to be code row i.
    words = packing.pack(jnp.asarray(codes[np.argsort(order)]), 4)[None]

    def kernel(x, words, by_query, by_weight, *scratch):
        own, others = scratch[: len(queries.scratch())], scratch[len(queries.scratch()) :]
        queries.bound(own, jnp.full((1, 1), largest))
        queries.put(own, 0, queries.factor(own, x[...]))
        product = queries.combine(queries.products(own, 0, words[...]))
        by_query[...] = product * tpu_products.splat(queries.inverse(own), product.shape)
        factor = weights.bound(others, jnp.full((1, 1), largest))
        scaled = x[...] * tpu_products.splat(factor, x.shape)
        (by_weight[...],) = weights.collect(others, weights.add(scaled, words[...], weights.zeros()))

    out = [jax.ShapeDtypeStruct((8, 128), jnp.float32)] * 2
    scratch = [*queries.scratch(), *weights.scratch()]
    return pl.pallas_call(kernel, out_shape=out, scratch_shapes=scratch, interpret=True)(jnp.asarray(x), words)


def test_integer_products_lose_little_relative_to_the_largest_row():
    rng = np.random.default_rng(0)
    codes, x = rng.integers(0, 16, (128, 128), dtype=np.uint8), rng.standard_normal((8, 128)).astype(np.float32)
    largest = np.abs(x).max()
    by_query, by_weight = (np.asarray(y, np.float64) for y in integer_products(x, codes, largest))
    # A number is off by half a unit at most: the largest is at least 2**13 or 2**20 units.
    np.testing.assert_allclose(by_query, x @ codes.T.astype(np.float64), rtol=0, atol=largest * 2.0**-14 * 15 * 128)
    np.testing.assert_allclose(by_weight, x @ codes.astype(np.float64), rtol=2e-7, atol=largest * 2.0**-21 * 15 * 128)


def test_weights_far_below_the_largest_count_together():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (128, 128), dtype=np.uint8)
    codes[0] = 0  # what the largest weight meets
    x = np.full((8, 128), 2.0**-14, np.float32)
    x[:, 0] = 1.0
    _, by_weight = integer_products(x, codes, np.float32(1.0))
    np.testing.assert_allclose(by_weight, x @ codes.astype(np.float64), rtol=2.0**-6)


def test_what_is_refused_says_why():
    shape = specs.Shape(1, 1, 1, 1, 1, 128)
    rng = np.random.default_rng(0)
    dense, values = specs.make("dense", shape, rng), specs.make("affine4-channels32", shape, rng)
    along_tokens = specs.make("affine4-tokens32", shape, rng)

    def refuses(why, k, v, group=1, rotates=False):
        with pytest.raises(NotImplementedError, match=why):
            api.check(k, v, group, "mosaic_tpu", "v5e", rotates)

    refuses("affine values with groups along channels", dense, along_tokens)
    refuses("up to 32 queries", dense, values, group=33)
    refuses("does not rotate keys", dense, values, rotates=True)
    refuses("groups of 32 or more, not 16", specs.make("affine4-tokens16", shape, rng), values)
    refuses("affine keys of 3 bits", specs.make("affine3-tokens32", shape, rng), values)
    odd = specs.Shape(1, 1, 1, 3, 1, 128)
    refuses("3 kv heads with one group per block", *(specs.make(x, odd, rng) for x in ("dense", "affine4-channels128")))
    for channels in (64, 96):  # uncompressed heads of these are read, packed ones not
        small = specs.Shape(1, 1, 1, 1, 1, channels)
        dense = specs.make("dense", small, rng)
        api.check(dense, dense, 1, "mosaic_tpu", "v5e", False)
        refuses(f"heads of {channels} channels do not fill 128 lanes", dense, specs.make("affine8-width", small, rng))
    short = specs.Shape(1, 1, 1, 1, 1, 128, 64)
    refuses("a multiple of 128 tokens, not 64", *(specs.make("dense", short, rng) for _ in "kv"))
