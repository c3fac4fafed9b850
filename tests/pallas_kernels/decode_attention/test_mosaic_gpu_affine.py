"""The Hopper kernel over dense and affine storage, in the interpreter of Mosaic GPU, against float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import pytest

from pallas_kernels.decode_attention import api, mosaic_gpu, specs

OLD = jax.__version_info__ < (0, 11)
needs_new_jax = pytest.mark.skipif(OLD, reason="The Hopper kernel needs JAX 0.11 (Python 3.12).")

# Each compiles for seconds: every storage once, every head size, and all of 0, 1, T-1, T, T+1, all and a late first.
CASES = [
    ("bf16", "gqa4-h128", "T+1,full", 0),
    ("f16", "gqa2-h256", "0,1", 0),
    ("int4", "mqa16-h64", "T+1,full", 100),
    ("int8", "mha-h128", "T-1,T", 0),
    ("kivi4", "mqa16-h64", "full,0", 100),
    ("kivi4-g128", "mha-h128", "T-1,T", 0),
    ("kivi8", "gqa3-h96", "T-1,T", 0),
    ("kivi2", "gqa4-h128-t256", "T+1,full", 0),
    ("kivi1", "gqa3-h96", "full,0", 100),
]


def run(arguments, splits=None, races=False):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    names = ("q", "k", "v", "layer", "first", "last")
    kernel = functools.partial(
        mosaic_gpu.decode_attention,
        rotation=None,
        chip="",
        interpret=plgpu.InterpretGPUParams(detect_races=races),
        splits=splits,
    )
    return jax.jit(kernel)(**{name: arguments[name] for name in names})


def assert_as_good_as_plain(arguments, expected, partial):
    k = arguments["k"]
    dtype = jnp.dtype(k.dtype if hasattr(k, "values") else "float16")
    plain = kernel_cases.errors(kernel_cases.low_precision(arguments, dtype), expected)
    for error, bound in zip(kernel_cases.errors(partial, expected), plain):
        assert error <= 2 * bound + 1e-5


@needs_new_jax
@pytest.mark.parametrize(("storage", "shape", "lengths", "first"), CASES)
def test_equals_float64(storage, shape, lengths, first):
    arguments, expected = kernel_cases.case(storage, shape, lengths, first)
    api.check(arguments["k"], arguments["v"], arguments["q"].shape[2], "mosaic_gpu", "", False)
    assert_as_good_as_plain(arguments, expected, run(arguments))


@needs_new_jax
def test_keys_of_two_bits_beside_values_of_one_in_two_splits():
    arguments, expected = kernel_cases.case("asymkv-k2v1", "mqa16-h64", "T+1,full")
    assert_as_good_as_plain(arguments, expected, run(arguments, splits=2))


@needs_new_jax
def test_no_races_between_copies_and_reads_of_many_chunks():
    # 5 blocks in chunks of 2: the last chunk is moved back over the one before it.
    arguments, expected = kernel_cases.case("int8", "gqa4-h128", "T+1,full")
    assert_as_good_as_plain(arguments, expected, run(arguments, splits=1, races=True))


@needs_new_jax
@pytest.mark.parametrize(
    ("storage", "shape", "why"),
    [
        ("bf16", "gqa3-h96", "head size 96"),
    ],
)
def test_what_is_not_done_is_said(storage, shape, why):
    arguments, _ = kernel_cases.case(storage, shape, "0,1")
    rotates = specs.STORAGES[storage].pre_rope
    with pytest.raises(NotImplementedError, match=why):
        api.check(arguments["k"], arguments["v"], arguments["q"].shape[2], "mosaic_gpu", "", rotates)


@pytest.mark.skipif(not OLD, reason="JAX 0.11 and newer run it")
def test_below_jax_0_11_check_says_so():
    arguments, _ = kernel_cases.case("kivi2", "gqa4-h128", "0,1")
    with pytest.raises(NotImplementedError, match=r"needs JAX 0\.11"):
        api.check(arguments["k"], arguments["v"], 4, "mosaic_gpu", "", False)
