"""Codebook storage in the TPU kernel, in the interpreters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import api, specs, tpu_plan
from pallas_kernels.decode_attention.heads import join_format

OLD, NEW = "v5e", "v6e"  # float32 gathers, and byte gathers

CASES = [
    ("kvquant4", "gqa4-h128", NEW),
    ("kvquant4-dense", "gqa3-h128", OLD),
    ("kvquant3", "gqa4-h128-t256", NEW),
    ("kvquant3-dense", "gqa4-h128-t256", OLD),
    ("kvquant2", "gqa16-h64", OLD),
    ("kvquant2", "gqa2-h256", NEW),
    ("kvquant2", "mqa2-h256-n96", NEW),
    ("kvquant4", "gqa4-h64", NEW),
    ("kvquant4-dense", "mha-h96", OLD),
]


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch):
    # The interpreter takes long to compile unrolled runs.
    monkeypatch.setattr(tpu_plan, "UNROLLED_TOKENS", 128)


@functools.partial(jax.jit, static_argnames=("shape", "chip", "interpret", "stride"))
def attend(q, k, v, layer, first, last, position, *, shape, chip, interpret, stride):
    rotation = dataclasses.replace(specs.rotation(specs.SHAPES[shape], position), stride=stride)
    stored = kernel_cases.joined({"q": q, "k": k, "v": v, "rotation": rotation})
    rows = {"layer": layer, "first": first, "last": last}
    return api.decode_attention(**stored, **rows, implementation="mosaic_tpu", chip=chip, interpret=interpret)


def run(arguments, shape, chip, interpret=True):
    operands = (arguments[x] for x in ("q", "k", "v", "layer", "first", "last"))
    rotation = arguments["rotation"]
    return attend(*operands, rotation.position, shape=shape, chip=chip, interpret=interpret, stride=rotation.stride)


def assert_close(cases, shape, **kwargs):
    """Over the cases, errors at most twice those of the plain evaluation in bfloat16."""
    ours = [kernel_cases.errors(run(arguments, shape, **kwargs), expected) for arguments, expected in cases]
    plain = [kernel_cases.errors(kernel_cases.low_precision(a, jnp.bfloat16), expected) for a, expected in cases]
    for error, bound in zip(np.max(ours, axis=0), np.max(plain, axis=0)):
        assert error <= 2 * bound + 1e-5, (ours, plain)


@pytest.mark.parametrize(("storage", "shape", "chip"), CASES)
def test_storage(storage, shape, chip):
    cases = [kernel_cases.case(storage, shape, lengths) for lengths in specs.LENGTHS]
    cases += [kernel_cases.case(storage, shape, lengths, 100) for lengths in ("T+1,full", "full,0")]
    assert_close(cases, shape, chip=chip)


@pytest.mark.parametrize(("storage", "shape", "chip"), [CASES[1], CASES[4]])
def test_every_third_block_of_a_context(storage, shape, chip):
    assert_close([kernel_cases.case(storage, shape, "T+1,full", 100, stride=3)], shape, chip=chip)


@pytest.mark.parametrize("shape", ["mha-h128", "gqa4-h64"])
def test_on_a_simulated_tpu_with_race_detection(shape):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    try:
        cases = [kernel_cases.case("kvquant2", shape, "T+1,full", 100)]
        assert_close(cases, shape, chip=NEW, interpret=pltpu.InterpretParams(detect_races=True))
        assert not simulator.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_what_is_refused_says_why():
    rng = np.random.default_rng(0)

    def refuses(why, keys, rotates, channels=128):
        shape = specs.Shape(1, 1, 1, 1, 1, channels)
        k, v = specs.make(keys, shape, rng), specs.make("codebook4-token", shape, rng)
        with pytest.raises(NotImplementedError, match=why):
            api.check(k, v, 1, "mosaic_tpu", "v6e", rotates)

    refuses("use blocks of 256 tokens", "codebook3", True)
    refuses("a scale per channel, not per token", "codebook4-token", False)
    refuses("outlier slots of keys that are stored before RoPE only", "codebook4-s", False)
    wide = specs.Shape(1, 1, 1, 4, 1, 96)
    four = [join_format(specs.make(x, wide, rng), 4) for x in ("codebook4-s", "codebook4-token")]
    with pytest.raises(NotImplementedError, match="slots name one of 256 channels, and 4 heads side by side have 384"):
        api.check(*four, 1, "mosaic_tpu", "v6e", True)
    for channels in (64, 96):
        refuses(f"heads of {channels} channels do not fill 128 lanes", "codebook4", True, channels)
