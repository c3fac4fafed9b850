"""Bit planes on TPU: what is read, what is not, and the answer, in the interpreters."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import packing
from pallas_kernels.decode_attention import mosaic_tpu, reference, specs, tpu_planes, tpu_planes_unpack


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units of two blocks, so that a few blocks make several chunks."""
    monkeypatch.setattr(tpu_planes, "UNIT_TOKENS", {0: 256})


def in_runs(x):
    """Storage with one level per run, the highest of its blocks."""
    run = tpu_planes.run(x)
    levels = np.asarray(x.levels)
    levels = np.pad(levels, ((0, 0), (0, -levels.shape[1] % run), (0, 0)))
    levels = levels.reshape(levels.shape[0], -1, run, levels.shape[2]).max(2)
    return dataclasses.replace(x, levels=jnp.asarray(levels), run=run)


def at(x, levels):
    return dataclasses.replace(x, levels=levels, limits=None)


def oracle(a):
    return kernel_cases.attend(a["q"], a["k"], a["v"], a["layer"], a["first"], a["last"])


_attend = jax.jit(tpu_planes.attend_in_part, static_argnames=("chip", "interpret"))  # one compilation for several tests


def run(a, chip="v5e", interpret=True):
    return _attend(**{n: x for n, x in a.items() if n != "rotation"}, chip=chip, interpret=interpret)


def case(shape="gqa4-h128", lengths="full,0", first=0):
    """A named case with levels by runs, some of them 0."""
    arguments, _ = kernel_cases.case("alignedkv", shape, lengths, first)
    for name, every in (("k", 5), ("v", 3)):
        x = in_runs(arguments[name])
        levels = np.array(x.levels)
        levels.flat[1::every] = 0
        arguments = {**arguments, name: at(x, jnp.asarray(levels))}
    return arguments


@pytest.mark.parametrize("bf16", [False, True])
def test_every_float16_is_unpacked_exactly(bf16):
    bits = np.arange(2**16, dtype=np.uint16).reshape(512, 128)
    planes = [packing.pack(jnp.asarray(bits >> s & m), w) for s, m, w in ((8, 255, 8), (4, 15, 4), (0, 15, 4))]
    order = np.asarray(tpu_planes_unpack.token_order(jnp.arange(512, dtype=jnp.int32), 512))
    assert sorted(order) == list(range(512))
    finite = (bits >> 10 & 31 < 31)[order]
    for level, (mask, fill) in enumerate(((0xFF00, 0x80), (0xFFF0, 0x8), (0xFFFF, 0)), start=1):

        def kernel(*refs, level=level):
            parts = tpu_planes_unpack.tiles([ref[...] for ref in refs[:level]], level, bf16)
            refs[-1][...] = sum(part.astype(jnp.float32) for part in parts) / tpu_planes_unpack.scale(bf16)

        out = jax.ShapeDtypeStruct((512, 128), jnp.float32)
        got = np.asarray(pl.pallas_call(kernel, out_shape=out, interpret=True)(*planes[:level]))
        want = kernel_cases.half((bits & mask | fill).astype(np.uint16))[order]
        assert (got[finite] == want[finite]).all()
        assert np.isfinite(got).all()  # what lies beyond a row's tokens is multiplied by 0


@pytest.mark.parametrize("lengths, first", [("0,1", 0), ("T-1,T", 100), ("T+1,full", 0), ("full,0", 300)])
def test_kernel_equals_float64_at_the_same_levels(lengths, first):
    a = case("gqa4-h128", lengths, first)
    error, log_error = kernel_cases.errors(run(a)[0], oracle(a))
    assert error < 5e-5 and log_error < 1e-5


def test_chips_with_bfloat16_arithmetic():
    a = case("mqa16-h128", "T+1,full")
    error, log_error = kernel_cases.errors(run(a, "v6e")[0], oracle(a))
    assert error < 5e-5 and log_error < 1e-5


def test_planes_that_are_not_needed_are_not_read():
    a = case()

    def poisoned(x):
        planes = []
        for i, plane in enumerate(x.planes):
            unread = np.repeat(np.asarray(x.levels), x.run, 1)[None, :, : plane.shape[2], :, None, None] <= i
            planes.append(np.where(unread, np.uint32(0xFFFFFFFF), plane))  # NaN, and the largest mantissa
        assert any((p != np.asarray(q)).any() for p, q in zip(planes, x.planes))
        return dataclasses.replace(x, planes=tuple(planes))

    clean = run(a)[0]
    for x, y in zip(clean, run({**a, "k": poisoned(a["k"]), "v": poisoned(a["v"])})[0]):
        np.testing.assert_array_equal(x, y)


def test_levels_of_values_follow_their_probabilities(monkeypatch):
    monkeypatch.setattr(tpu_planes, "units", lambda tokens, blocks, channels: (2, -(-blocks // 2), 2))
    a = case("gqa4-h128", "T+1,full")
    limits = np.sort(np.random.default_rng(1).uniform(-9, -1, (3, 2, 3, 2)).astype(np.float32), axis=0)
    known = np.stack([np.full((2, 4), x, np.float32) for x in (-1e30, 3.0)])
    v = dataclasses.replace(a["v"], levels=None, limits=jnp.asarray(limits), known=known)
    partial, read = run({**a, "v": v})
    error, log_error = kernel_cases.errors(partial, oracle({**a, "v": at(v, read)}))
    assert error < 5e-5 and log_error < 1e-5
    # The reference knows the final probabilities, the kernel bounds them: it may only read more.
    wanted = jax.jit(reference.attend_in_part)(a["q"], a["k"], v, a["layer"], a["first"], a["last"])[1]
    assert (read >= wanted).all()
    assert (read[1] == wanted[1]).mean() > 0.6 and len(np.unique(read)) > 2
    assert (read[0, 1:] == 0).all()  # beyond the row's 129 tokens


@pytest.mark.parametrize("shape, online", [("mha-h128", False), ("gqa4-h128", True), ("gqa2-h256", True)])
def test_without_races(shape, online):
    a = case(shape, "T+1,full")
    if online:
        limits = np.stack([np.full(a["v"].levels.shape, x, np.float32) for x in (-9, -4, -3)])
        a["v"] = dataclasses.replace(a["v"], levels=None, limits=limits)
    partial, read = run(a, interpret=pltpu.InterpretParams(detect_races=True))
    error, _ = kernel_cases.errors(partial, oracle({**a, "v": at(a["v"], read)}))
    assert error < 5e-5
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found


def test_reference_reads_by_limits():
    """Two blocks of 32 tokens: one holds nearly all of the probability and is read, the other is skipped."""
    rng = np.random.default_rng(0)
    shape = specs.Shape(1, 1, 2, 1, 1, 4, tokens=32)
    v = specs.make("planes", shape, rng)
    scores = jnp.asarray(np.r_[np.zeros(32), np.full(32, -20.0)][None, None, None], jnp.float32)
    limits = jnp.log(jnp.asarray([1e-6, 0.02, 0.5], jnp.float32)).reshape(3, 1, 1, 1) + jnp.zeros((3, 1, 2, 1))
    v = dataclasses.replace(v, levels=None, limits=limits)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    np.testing.assert_array_equal(reference.levels_within(v, scores, log_sum)[0, :, 0], [2, 0])
    # With as much elsewhere, each token has half: below the second limit.
    v = dataclasses.replace(v, known=jnp.log(jnp.full((1, 1, 1), 32.0)))
    np.testing.assert_array_equal(reference.levels_within(v, scores, log_sum)[0, :, 0], [1, 0])


@pytest.mark.parametrize(
    "side, change, message",
    [
        ("k", {"limits": 0.0}, "keys are read by `levels`"),
        ("v", {"order": "channels"}, 'keys in order "channels" and values in "channels"'),
    ],
)
def test_what_is_refused(side, change, message):
    a = case()
    a = {**a, side: dataclasses.replace(a[side], **change)}
    with pytest.raises(NotImplementedError, match=message):
        mosaic_tpu.check(a["k"], a["v"], 3, "v5e", False)


def test_runs_are_the_kernels():
    a = case()
    with pytest.raises(ValueError, match="`run=2` of `k` and 3 of `v` must be the 2 blocks"):
        run({**a, "v": dataclasses.replace(a["v"], run=3)})
