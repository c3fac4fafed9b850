"""Decode attention written for XLA on CPU, against float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels.decode_attention import api, specs, xla_cpu

attend = functools.partial(api.decode_attention, implementation="xla_cpu")


def _check(storage, shape, lengths, first=0, step=None, stride=1):
    arguments, expected = kernel_cases.case(storage, shape, lengths, first, stride)
    rest = {name: x for name, x in arguments.items() if name != "rotation"}
    partial = (step or jax.jit(functools.partial(attend, rotation=arguments["rotation"])))(**rest)
    error, log_error = kernel_cases.errors(partial, expected)
    assert error < 1e-4 and log_error < 1e-4  # angles are float32


@pytest.mark.parametrize("storage", specs.STORAGES)
def test_every_storage(storage):
    _check(storage, "gqa4-h128", "T+1,full")


@pytest.mark.parametrize("shape", ["mha-h128", "mqa16-h64", "gqa3-h96", "gqa2-h256"])
@pytest.mark.parametrize("storage", ["kivi4", "kvquant3"])
def test_every_shape(storage, shape):
    _check(storage, shape, "full,0")


@pytest.mark.parametrize("chunk_blocks", [1, 2, 4])
def test_sees_only_its_tokens(chunk_blocks, monkeypatch):
    # Three blocks: with chunks of two the last one overlaps the one before.
    size = specs.SHAPES["gqa3-h96"]
    one = size.batch * size.heads * size.tokens * size.channels
    monkeypatch.setattr(xla_cpu, "CHUNK_ELEMENTS", chunk_blocks * one)
    step = jax.jit(attend)
    for lengths in specs.LENGTHS:
        for first in (0, 100):
            _check("kivi2", "gqa3-h96", lengths, first, step)
    assert step._cache_size() == 1  # lengths are traced


def test_rotated_keys_in_chunks_that_overlap(monkeypatch):
    size = specs.SHAPES["gqa3-h96"]
    monkeypatch.setattr(xla_cpu, "CHUNK_ELEMENTS", 2 * size.batch * size.heads * size.tokens * size.channels)
    _check("kvquant4", "gqa3-h96", "T+1,full", 100)
    _check("kvquant4", "gqa3-h96", "T+1,full", 100, stride=3)


@pytest.mark.parametrize("storage", ["bf16", "kivi4", "kvquant3"])
def test_temporaries_do_not_grow_with_the_context(storage):
    def temporaries(blocks):
        shape, kinds = specs.Shape(2, 1, blocks, 2, 4, 64), specs.STORAGES[storage]
        small = specs.Shape(2, 1, 1, 2, 4, 64)
        # Shapes of `blocks` blocks without making them: leaves of one block with a longer third axis.
        k, v = (specs.make(x, small, np.random.default_rng(0)) for x in (kinds.keys, kinds.values))

        def grow(leaf):
            per_block = leaf.ndim > 3 and leaf.shape[:3] == (2, 1, 1)
            return jax.ShapeDtypeStruct((2, 1, blocks, *leaf.shape[3:]) if per_block else leaf.shape, leaf.dtype)

        if kinds.pre_rope:  # ranges `[L, K, 1, H]` are not per block
            ranges = {name: jax.ShapeDtypeStruct(getattr(k, name).shape, jnp.float32) for name in ("scale", "zero")}
            k = type(k)(**{**{f: getattr(jax.tree.map(grow, k), f) for f in k.__dataclass_fields__}, **ranges})
        else:
            k = jax.tree.map(grow, k)
        v = jax.tree.map(grow, v)
        row = jax.ShapeDtypeStruct((1,), jnp.int32)

        def step(q, k, v, layer, last):
            rotation = specs.rotation(shape, last) if kinds.pre_rope else None
            return attend(q, k, v, layer=layer, first=last * 0, last=last, rotation=rotation)

        q = jax.ShapeDtypeStruct((1, 2, 4, 64), jnp.float32)
        compiled = jax.jit(step).lower(q, k, v, jax.ShapeDtypeStruct((), jnp.int32), row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) == temporaries(1024)
