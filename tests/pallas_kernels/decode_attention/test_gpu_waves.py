"""How many programs a Hopper GPU holds at once, and into how many splits a context is cut for them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import budget, gpu_planes, gpu_waves, mosaic_gpu, specs
from pallas_kernels.decode_attention.gpu_waves import programs_at_once, splits_in_waves

MILLION = 1 << 20


@pytest.mark.parametrize(
    ("heads", "at_once", "tokens", "splits"),
    [
        (8, 264, MILLION, 33),  # 264 programs: all that there is room for. 66 would be as busy, and are more.
        (8, 132, MILLION, 33),  # 264 are two waves; one of 16 * 8 = 128 leaves 4 of 132 idle, 3 %.
        (8, 396, MILLION, 49),  # 392 of 396: 1 % idle. 99 * 8 = 792 are two whole waves, and not worth it.
        (1, 264, MILLION, 259),  # 259 of 264 are less than 2 % idle, 258 more.
        (64, 264, MILLION, 4),  # 256 of 264; 9 * 64 = 576 would be 2.2 waves, so three.
        (40, 264, MILLION, 13),  # 6 * 40 = 240 of 264, or 13 * 40 = 520 of 528.
        (512, 264, MILLION, 1),  # 512 of 528, two waves already; a third would not hold another 512.
        (300, 264, MILLION, 2),  # 300 of 528, or 600 of 792.
        (8, 264, 32768, 16),  # no less than 2,048 tokens each
        (1, 264, 32768, 16),
        (8, 264, 2047, 1),
    ],
)
def test_splits_fill_whole_waves(heads, at_once, tokens, splits):
    assert splits_in_waves(heads, at_once, tokens) == splits


@pytest.mark.parametrize(
    ("kib", "most", "each"),
    # 228 KiB of a multiprocessor, 5 of them beside a program's arrays: two of 109, three of 71, one of any that fits.
    [(109, 2, 2), (110, 2, 1), (219, 2, 1), (71, 3, 3), (72, 3, 2), (8, 2, 2)],
)
def test_programs_of_a_multiprocessor_share_its_memory(kib, most, each):
    # Arrays begin at multiples of 1 KiB: the second, of 4 bytes, takes a whole one.
    scratch = [jax.ShapeDtypeStruct((kib - 1, 512), jnp.float16), jax.ShapeDtypeStruct((1,), jnp.float32)]
    assert programs_at_once(scratch, most) == 132 * each


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="The Hopper kernel needs JAX 0.11 (Python 3.12).")
def test_programs_that_are_counted_on_have_room():
    """By what the compilers said: shared memory and registers."""
    rows = json.loads((Path(__file__).parents[2] / "compile/budget.json").read_text(encoding="utf-8"))["rows"]
    found = set()
    for row in rows:
        if row["chip"] != "h100":
            continue
        storage, shape = budget.CASES[row["storage"]]
        shape = dataclasses.replace(shape, blocks=1, tokens=128)
        if storage in specs.PLANES_READ:
            kinds = specs.PLANES["alignedkv"]
            k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
            shared, most = gpu_planes.plan(k, v, shape.group, None).shared(), 3
        else:
            kinds = specs.STORAGES[storage]
            k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
            _, *decoders = mosaic_gpu.decoders(k, v, shape.group)
            shared, most = [x for d in decoders for x in d.scratch()], 2
        assert row["shared_bytes"] + 1024 <= gpu_waves.each_bytes(shared) <= row["shared_bytes"] + 2048
        at_once = programs_at_once(shared, most) // 132
        # Registers are given to a warp in pieces of 256.
        assert at_once * 4 * -(-32 * row["registers"] // 256) * 256 <= 65536
        found.add(at_once)
    assert found == {1, 2, 3}
