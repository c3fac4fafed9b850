"""Bit planes on Hopper: what is read, what is not, and the answer, in the interpreter of Mosaic GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels import packing
from pallas_kernels.decode_attention import api, gpu_planes, reference

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="The Hopper kernel needs JAX 0.11 (Python 3.12)."
)


def case(shape, lengths, first=0):
    """A named case with levels from 0 to 3; those of values (`read`) by limits that all or no probabilities exceed."""
    a, _ = kernel_cases.case("alignedkv", shape, lengths, first)
    for name, every in (("k", 5), ("v", 3)):
        levels = np.array(a[name].levels)
        levels.flat[1::every] = 0
        a = {**a, name: dataclasses.replace(a[name], levels=jnp.asarray(levels))}
    levels = np.asarray(a["v"].levels)
    limits = np.where(np.arange(3).reshape(3, 1, 1, 1) < levels[None], -np.inf, np.inf).astype(np.float32)
    known = np.full(a["q"].shape[:3], reference.EMPTY, np.float32)
    return {**a, "v": dataclasses.replace(a["v"], levels=None, limits=limits, known=known)}, levels


@functools.cache
def kernel(splits, races):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=races)
    return jax.jit(functools.partial(gpu_planes.attend_in_part, interpret=interpret, splits=splits))


attend_in_part = jax.jit(reference.attend_in_part)


def run(a, splits=2, races=False):
    return kernel(splits, races)(*(a[n] for n in ("q", "k", "v", "layer", "first", "last")))


def oracle(a, levels):
    v = dataclasses.replace(a["v"], levels=levels, limits=None)
    return kernel_cases.attend(a["q"], a["k"], v, a["layer"], a["first"], a["last"])


# Every head size, 8 and 32 columns; each shape compiles for seconds.
@needs_new_jax
@pytest.mark.parametrize(
    ("shape", "lengths", "first"),
    [
        ("gqa4-h128", "T+1,full", 0),
        ("gqa4-h128", "0,1", 0),
        ("gqa4-h128", "T-1,T", 100),
        ("gqa4-h128", "full,0", 300),
        ("mqa16-h64", "full,0", 100),
        ("gqa3-h96", "T-1,T", 0),
        ("gqa2-h256", "T+1,full", 0),
    ],
)
def test_equals_float64_at_the_same_levels(shape, lengths, first):
    a, levels = case(shape, lengths, first)
    api.check(a["k"], a["v"], a["q"].shape[2], "mosaic_gpu", "sm_90", False)
    partial, read = run(a)
    block = np.arange(levels.shape[1])[None, :, None]
    begin, end = (np.asarray(a[n])[:, None, None] for n in ("first", "last"))
    seen = (block * 128 < end) & (block * 128 + 128 > begin) & (begin < end)
    np.testing.assert_array_equal(read, np.where(seen, levels, 0))
    error, log_error = kernel_cases.errors(partial, oracle(a, levels))
    assert error < 2e-5 and log_error < 5e-6  # queries and weights have 22 bits


@needs_new_jax
def test_planes_that_are_not_needed_are_not_read():
    a, levels = case("gqa4-h128", "T+1,full")

    def poisoned(x, levels):
        planes = []
        for i, plane in enumerate(x.planes):
            unread = np.asarray(levels)[None, :, :, :, None, None] <= i
            planes.append(np.where(unread, np.uint32(0xFFFFFFFF), plane))  # NaN, and the largest mantissa
        assert any((p != np.asarray(q)).any() for p, q in zip(planes, x.planes))
        return dataclasses.replace(x, planes=tuple(planes))

    other = {**a, "k": poisoned(a["k"], a["k"].levels), "v": poisoned(a["v"], levels)}
    for x, y in zip(run(a)[0], run(other)[0]):
        np.testing.assert_array_equal(x, y)


@needs_new_jax
@pytest.mark.parametrize("known", [-1e30, 3.0])
def test_levels_of_values_follow_their_probabilities(known):
    a, _ = case("gqa4-h128", "T+1,full")
    limits = np.sort(np.random.default_rng(1).uniform(-9, -1, (3, 2, 5, 2)).astype(np.float32), axis=0)
    v = dataclasses.replace(a["v"], limits=jnp.asarray(limits), known=np.full((2, 2, 4), known, np.float32))
    partial, read = run({**a, "v": v})
    error, log_error = kernel_cases.errors(partial, oracle(a, read))
    assert error < 2e-5 and log_error < 5e-6
    # The reference knows the final probabilities, the kernel bounds them: it may only read more.
    wanted = attend_in_part(a["q"], a["k"], v, a["layer"], a["first"], a["last"])[1]
    assert (read >= wanted).all()
    assert (read == wanted).mean() > 0.6 and len(np.unique(read)) > 2
    assert (read[0, 2:] == 0).all()  # beyond the row's 129 tokens


@needs_new_jax
def test_no_races_between_copies_and_reads():
    a, levels = case("gqa4-h128", "T+1,full")
    error, _ = kernel_cases.errors(run(a, splits=1, races=True)[0], oracle(a, levels))
    assert error < 2e-5


def test_what_is_not_done_is_said():
    a, _ = case("gqa4-h128", "0,1")
    k, v = a["k"], a["v"]
    assert "keys are read by `levels`" in gpu_planes.refusal(dataclasses.replace(k, limits=0.0), v)
    assert 'keys are in order "channels" and values in "channels"' in gpu_planes.refusal(k, k)
    longer, _ = case("gqa4-h128-t256", "0,1")
    assert "128 tokens, not 256" in gpu_planes.refusal(longer["k"], longer["v"])
    with pytest.raises(ValueError, match="`run=2` of `k` and 1 of `v` must be 1"):
        gpu_planes.attend_in_part(a["q"], dataclasses.replace(k, run=2), v, a["layer"], a["first"], a["last"])


# What the interpreter does not run: the registers of 128 threads, from shared memory as the copy engine fills it.

THREADS = np.arange(128, dtype=np.uint32)
THREAD = THREADS >> 5, THREADS >> 2 & 7, THREADS & 3


def swizzled(words):
    """`words[rows, columns]` in lines of 32, eight lines together, 16-byte chunks exchanged by their line."""
    rows, columns = words.shape
    x = words.reshape(rows // 8, 8, columns // 32, 8, 4).transpose(0, 2, 1, 3, 4)
    line, chunk = np.ogrid[:8, :8]
    return x[:, :, line, chunk ^ line].ravel()


def at(memory):
    def start(word):
        return lambda lines, count: [memory[word + np.uint32(32 * lines + i)] for i in range(count)]

    return start


def prmt(a, b, select):
    both = np.stack([x >> np.uint32(8 * i) & np.uint32(255) for x in (a, b) for i in range(4)])
    return sum(both[select >> (4 * i) & 7] << np.uint32(8 * i) for i in range(4))


def tile(registers):
    """`[64, columns]` uint16 of the registers of a `wgmma` operand: row 16 w + r, of 16 columns 2 j and 8 + 2 j."""
    out = np.zeros((64, 4 * len(registers)), np.uint16)
    for i, register in enumerate(registers):
        row, column = 16 * THREAD[0] + THREAD[1] + 8 * (i % 2), 16 * (i // 4) + 8 * (i // 2 % 2) + 2 * THREAD[2]
        out[row, column], out[row, column + 1] = register & 0xFFFF, register >> 16
    return out


@needs_new_jax
@pytest.mark.parametrize("channels", [128, 96])
def test_registers_are_float16_as_stored(channels):
    from pallas_kernels.decode_attention import gpu_planes_tiles as tiles
    from pallas_kernels.decode_attention.gpu_words import value_rows

    bits = np.random.default_rng(0).permutation(2**16)[: 128 * channels].astype(np.uint16).reshape(128, channels)
    planes = [
        np.asarray(packing.pack(jnp.asarray(bits >> s & m), w)) for s, m, w in ((8, 255, 8), (4, 15, 4), (0, 15, 4))
    ]
    k_shapes, v_shapes = tiles.shapes(channels)
    k_planes = [at(swizzled(p.T.reshape(shape))) for p, shape in zip(planes, k_shapes)]
    v_planes = [at(swizzled(p.reshape(shape))) for p, shape in zip(planes, v_shapes)]
    row = np.arange(64)
    for level, (mask, fill) in enumerate(((0xFF00, 0x80), (0xFFF0, 0x8), (0xFFFF, 0)), start=1):
        want = bits & mask | fill
        part = range(32, 96)
        for p, found in enumerate(tiles.key_registers(k_planes[:level], prmt, THREAD, part)):
            np.testing.assert_array_equal(tile(found), want[tiles.token(row, p), part.start : part.stop])
        for i in range(-(-channels // 64)):
            here = value_rows(np.arange(-(-channels // 64) * 64))[64 * i : 64 * i + 64]
            kept = here < channels
            for p, found in enumerate(tiles.value_registers(v_planes[:level], prmt, THREAD, channels // 32, i)):
                tokens = tiles.token(np.asarray(tiles.rows_by_position()), p)
                np.testing.assert_array_equal(tile(found)[kept], want[tokens][:, here[kept]].T)


@needs_new_jax
def test_weights_lie_where_values_expect_them():
    from pallas_kernels.decode_attention import gpu_planes_tiles as tiles

    memory = np.full((2, 256), -1)
    for odd in range(2):
        for half in range(2):  # of a word: the row and that 8 rows further
            memory[half, tiles.weight_word(THREAD, odd)] = (
                100 * (2 * THREAD[2] + odd) + 16 * THREAD[0] + THREAD[1] + 8 * half
            )
    line, chunk = np.ogrid[:8, :8]
    words = memory.reshape(2, 8, 8, 4)[:, line, chunk ^ line].reshape(2, 8, 32)
    rows = words.transpose(1, 2, 0).reshape(8, 64)
    np.testing.assert_array_equal(rows, 100 * np.arange(8)[:, None] + np.asarray(tiles.rows_by_position()))
