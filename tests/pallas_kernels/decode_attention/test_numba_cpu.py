"""Decode attention compiled by numba, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels.decode_attention import api, numba_cpu, numba_vectors, reference, specs

attend = functools.partial(api.decode_attention, implementation="numba_cpu")

# numba's code is the same with any JAX; only what calls it is not.
newest = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="tested with the newest JAX")


def _check(storage, shape, lengths, first=0, stride=1):
    arguments, expected = kernel_cases.case(storage, shape, lengths, first, stride)
    rest, rotation = {name: x for name, x in arguments.items() if name != "rotation"}, arguments["rotation"]
    if rotation is not None:
        rotation = dataclasses.replace(rotation, angles=functools.partial(_angles, rest["q"].shape[-1]))
    partial = jax.jit(functools.partial(attend, rotation=rotation))(**rest)
    error, log_error = kernel_cases.errors(partial, expected)
    assert error < 5e-5 and log_error < 5e-5


def _angles(channels, offsets, theta=10000.0):
    """As `specs.rotation`, exact: angles in units of 2**-32 turns, of which whole turns fall away."""
    inv_freq = np.asarray(theta ** (-np.arange(0, channels, 2) / channels), np.float32).astype(np.float64)
    unit = np.round(inv_freq / (2 * np.pi) * 2**32).astype(np.uint32).view(np.int32)[(None,) * offsets.ndim]
    angle = (offsets[..., None] * unit).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    return jnp.cos(angle), jnp.sin(angle)


@pytest.mark.parametrize(
    "storage", [x if x in ("kivi4", "kvquant3") else pytest.param(x, marks=newest) for x in specs.STORAGES]
)
def test_every_storage(storage):
    _check(storage, "gqa4-h128", "T+1,full")


@newest
@pytest.mark.parametrize(
    ("storage", "shape"),
    [
        ("kivi4", "mha-h128"),
        ("kvquant3", "mqa16-h64"),
        ("kivi4", "gqa3-h96"),  # groups of 32 in registers of 16
        ("kvquant4", "gqa3-h96"),
        ("kvquant3", "gqa2-h256"),
        ("kvquant2", "gqa4-h128-t256"),
        ("int4", "mqa2-h256-n96"),  # a block's number has two digits
        ("kvquant4-dense", "mqa2-h256-n96"),
    ],
)
def test_shapes(storage, shape):
    _check(storage, shape, "full,0")


@pytest.mark.parametrize("lengths", specs.LENGTHS)
@pytest.mark.parametrize("first", [0, 100])
def test_sees_only_its_tokens(lengths, first):
    _check("kivi2", "gqa4-h128", lengths, first)
    _check("kvquant4", "gqa4-h128", lengths, first, stride=3)


@newest
@pytest.mark.parametrize("found", [(8, "llvm.x86.avx2.permps"), None])
@pytest.mark.parametrize("storage", ["kvquant4", "kvquant3"])
def test_levels_on_machines_with_other_registers(storage, found, monkeypatch):
    if found and not numba_vectors.permutation():
        pytest.skip("needs AVX2")
    monkeypatch.setattr(numba_vectors, "permutation", lambda: found)
    assert numba_vectors.lanes() == (found[0] if found else 4)
    numba_cpu._operation.cache_clear()
    _check(storage, "gqa3-h96", "T+1,full")
    numba_cpu._operation.cache_clear()


def _in_part(arguments, **changes):
    rest = {name: x for name, x in arguments.items() if name != "rotation"} | changes
    return jax.jit(functools.partial(api.attend_in_part, implementation="numba_cpu"))(**rest)


def _some_unread(v):
    levels = np.array(v.levels)
    levels.flat[1::3] = 0
    return dataclasses.replace(v, levels=jnp.asarray(levels))


def _off(arguments, partial, v):
    """Errors against float64 over what was read."""
    rest = [arguments[x] for x in ("q", "k", "layer", "first", "last")]
    return kernel_cases.errors(partial, kernel_cases.attend(*rest[:2], v, *rest[2:]))


@pytest.mark.parametrize(
    ("shape", "lengths", "first"),
    [("gqa4-h128", "T-1,T", 100), ("gqa4-h128", "T+1,full", 0)]
    + [pytest.param(x, "full,0", 300, marks=newest) for x in ("mha-h96", "mqa16-h64", "gqa2-h256")],
)
def test_planes(shape, lengths, first):
    """Each block at its level; what a level leaves out is not read: NaN, and the largest mantissa."""
    arguments, _ = kernel_cases.case("alignedkv", shape, lengths, first)
    v = _some_unread(arguments["v"])
    partial, levels = _in_part(arguments, v=v)
    assert max(_off(arguments, partial, v)) < 5e-5
    poisoned = []
    for x in (arguments["k"], v):
        unread = (np.asarray(x.levels)[None, :, :, :, None, None] <= i for i in range(3))
        planes = tuple(np.where(u, np.uint32(0xFFFFFFFF), p) for u, p in zip(unread, x.planes))
        poisoned.append(dataclasses.replace(x, planes=planes))
    for a, b in zip(_in_part(arguments, k=poisoned[0], v=poisoned[1])[0], partial):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(levels) <= np.asarray(v.levels)).all() and len(np.unique(levels)) > 1


def test_levels_of_values_follow_their_probabilities():
    arguments, _ = kernel_cases.case("alignedkv", "gqa4-h128", "T+1,full")
    shape = (3, *arguments["v"].levels.shape)
    limits = np.sort(np.random.default_rng(1).uniform(-9, -1, shape).astype(np.float32), axis=0)
    known = np.stack([np.full((2, 4), x, np.float32) for x in (-1e30, 3.0)])
    v = dataclasses.replace(arguments["v"], levels=None, limits=jnp.asarray(limits), known=known)
    partial, read = _in_part(arguments, v=v)
    assert max(_off(arguments, partial, dataclasses.replace(v, levels=read, limits=None))) < 5e-5
    # The reference knows the final probabilities, the kernel bounds them: it may only read more.
    rest = [arguments[x] for x in ("q", "k", "layer", "first", "last")]
    wanted = jax.jit(reference.attend_in_part)(*rest[:2], v, *rest[2:])[1]
    assert (read >= wanted).all() and (read == wanted).mean() > 0.6 and len(np.unique(read)) > 2
    assert (read[0, 2:] == 0).all()  # beyond the row's 129 tokens


@pytest.mark.parametrize("storage", ["f16", "kivi4", "alignedkv"])
def test_subnormal_float16_count(storage):
    """XLA's threads take subnormal float32 for 0; small values and scales must not become that."""
    arguments, _ = kernel_cases.case(storage, "gqa4-h128", "T+1,full")
    rest, v = {name: x for name, x in arguments.items() if name != "rotation"}, arguments["v"]

    def smaller(bits):
        return (np.asarray(bits).view(np.float16) * np.float16(2.0**-15)).view(np.uint16)

    if storage == "f16":
        v = dataclasses.replace(v, values=smaller(v.values))
    elif storage == "kivi4":
        v = dataclasses.replace(v, scale=smaller(v.scale), zero=smaller(v.zero))
    else:  # no exponent, and all of the mantissa
        first = np.asarray(v.planes[0]) & np.uint32(0x83838383)
        v = dataclasses.replace(v, planes=(first, *v.planes[1:]), levels=np.full_like(v.levels, 3))
    rest |= {"v": jax.tree.map(jnp.asarray, v)}
    expected = kernel_cases.attend(*(rest[x] for x in ("q", "k", "v", "layer", "first", "last")))
    error, _ = kernel_cases.errors(jax.jit(attend)(**rest), expected)
    assert error < 5e-5


@newest
def test_float16_on_machines_that_do_not_convert_it(monkeypatch):
    monkeypatch.setattr(numba_vectors.llvmlite.binding, "get_host_cpu_features", dict)
    assert numba_vectors.lanes() == 4
    numba_cpu._operation.cache_clear()
    test_subnormal_float16_count("f16")
    numba_cpu._operation.cache_clear()


def test_temporaries_do_not_grow_with_the_context():
    def temporaries(blocks):
        shape, kinds = specs.Shape(2, 1, blocks, 2, 4, 128), specs.STORAGES["kvquant4-dense"]
        k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
        row = jax.ShapeDtypeStruct((1,), jnp.int32)

        def step(q, k, v, layer, last):
            return attend(q, k, v, layer=layer, first=last * 0, last=last, rotation=specs.rotation(shape, last))

        q = jax.ShapeDtypeStruct((1, 2, 4, 128), jnp.float32)
        compiled = jax.jit(step).lower(q, k, v, jax.ShapeDtypeStruct((), jnp.int32), row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) == temporaries(1024)


def test_refusals():
    shape = specs.Shape(1, 1, 2, 4, 1, 128)

    def refuses(why, keys, values, rotates=False):
        k, v = (specs.abstract(kind, shape) for kind in (keys, values))
        with pytest.raises(NotImplementedError, match=why):
            api.check(k, v, 1, "numba_cpu", "", rotates)

    refuses("both be stored in float16 planes", "planes-channels", "dense")
    refuses('values in "channels"; read are "channels" and "words"', "planes-channels", "planes-channels")
    refuses("it does not rotate uniform codes", "affine4-tokens32", "affine4-channels32", rotates=True)
    refuses("8 groups of tokens do not divide the 4 fields", "affine8-tokens16", "affine8-channels32")
    refuses("scales of values are taken per token", "affine4-tokens32", "affine4-tokens32")


def test_without_numba_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    k = specs.abstract("dense", specs.Shape(1, 1, 2, 4, 1, 128))
    with pytest.raises(NotImplementedError, match="install the extra `cpu`"):
        api.check(k, k, 1, "numba_cpu", "", False)


def test_what_is_out_of_range_is_clamped():
    arguments, _ = kernel_cases.case("kivi4", "gqa4-h128", "full,0")
    rest = {name: x for name, x in arguments.items() if name != "rotation"}
    step, beyond = (
        jax.jit(attend),
        {"layer": jnp.int32(1 << 30), "last": rest["last"] * 1000, "first": rest["first"] - 7},
    )
    for a, b in zip(step(**rest | beyond), step(**rest)):
        np.testing.assert_array_equal(a, b)


def test_nan_stays_nan():
    arguments, _ = kernel_cases.case("bf16", "gqa4-h128", "T+1,full")
    rest = arguments | {"q": arguments["q"].at[0, 0, 0, 0].set(np.nan)}
    partial = jax.jit(attend)(**{name: x for name, x in rest.items() if name != "rotation"})
    nan = np.isnan(np.asarray(partial.acc)).all(-1)
    assert nan[0, 0, 0] and not nan[1].any() and not nan[0, 1].any() and not nan[0, 0, 1:].any()
