"""Decode attention on Hopper over float16 in bit planes, which does not read the planes that a query does not need.

A block of 128 tokens of one kv head is read to one level; the kernel is in `gpu_planes_kernel`, what happens around it
here. Nothing is gained by larger runs: a block's planes are 16, 8 and 8 KiB (128 channels) in one piece, of keys whose
words lie along tokens ("channels") as of values in "words".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import plane_blocks
from pallas_kernels.decode_attention.formats import Format, Partial, Planes, shape_of

TOKENS = 128


def refusal(k: Format, v: Format) -> str:
    """Why the kernel does not read them, or nothing."""
    why, tokens = plane_blocks.refusal(k, v), shape_of(k)[4]
    return why or ("" if tokens == TOKENS else f"blocks must have {TOKENS} tokens, not {tokens}")


def run(k: Format) -> int:
    """Blocks that are read to one level."""
    del k
    return 1


def plan(k: Planes, v: Planes, group: int, interpret: Any, splits: int | None = None):
    from pallas_kernels.decode_attention.gpu_planes_kernel import Plan
    from pallas_kernels.decode_attention.gpu_waves import programs_at_once, splits_in_waves

    _, batch, blocks, heads, _, channels = shape_of(k)
    columns = 8 if group <= 4 else 16 if group <= 8 else 32
    sizes = Plan(batch, heads, blocks, channels, group, columns, 1, v.levels is None, interpret)
    if splits is None:
        # With 8 columns a thread takes 163 registers, and a multiprocessor has room for three programs.
        at_once = programs_at_once(sizes.shared(), 3 if columns == 8 else 2)
        splits = splits_in_waves(batch * heads, at_once, blocks * TOKENS)
    return dataclasses.replace(sizes, splits=splits)


def attend_in_part(
    q: jax.Array,
    k: Planes,
    v: Planes,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    chip: str = "",
    interpret: Any = None,
    splits: int | None = None,
) -> tuple[Partial, jax.Array]:
    """As `api.attend_in_part`; `splits` overrides how many programs share a row and head."""
    plane_blocks.check_runs(k, v)
    from pallas_kernels.decode_attention import gpu_planes_kernel, gpu_planes_tiles
    from pallas_kernels.decode_attention.gpu_dense import normalised
    from pallas_kernels.decode_attention.gpu_skeleton import LOG2E, merged

    del chip
    group = q.shape[2]
    p = plan(k, v, group, interpret, splits)
    scaled, unit = normalised(q, jnp.float32)
    # reduce_precision, for XLA may take a conversion to float16 and back for nothing.
    high = jax.lax.reduce_precision(scaled, 5, 10)
    lost = (scaled - high) * jnp.float32(gpu_planes_tiles.LOST)
    operand = jnp.stack([high, lost], axis=3).reshape(*q.shape[:2], 2 * group, q.shape[3]).astype(jnp.float16)
    padding = p.columns - 2 * group, p.tiles * gpu_planes_tiles.ROWS - p.channels
    operand = jnp.pad(operand, ((0, 0), (0, 0), *((0, n) for n in padding)))
    known = jnp.full(unit.shape, gpu_planes_kernel.EMPTY, jnp.float32) if v.known is None else v.known
    # Columns that no query fills must not ask for anything.
    known = known * jnp.float32(LOG2E) + jnp.float32(gpu_planes_kernel.LIFT)
    known = gpu_planes_tiles.paired(known, p.columns, -gpu_planes_kernel.EMPTY)
    rule = v.limits if p.online else v.levels[None]
    shapes = [*gpu_planes_tiles.shapes(p.channels)[0], *gpu_planes_tiles.shapes(p.channels)[1]]
    planes = [x.reshape(-1, *shape) for x, shape in zip((*k.planes, *v.planes), shapes)]
    scalars = [x.astype(jnp.int32).reshape(-1) for x in (layer, first, last)]
    unit = gpu_planes_tiles.paired(unit, p.columns, 0.0)
    arrays = [*scalars, k.levels, rule, operand, unit, known, *planes]
    acc, top, total, read = gpu_planes_kernel.call(p, arrays)
    partial = merged(acc, top, total, gpu_planes_kernel.LIFT)
    return partial, plane_blocks.where_seen(read.swapaxes(1, 2).astype(jnp.int32), first, last, TOKENS)
