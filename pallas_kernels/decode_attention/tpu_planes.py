"""Decode attention on TPU over float16 in bit planes, which does not read the planes that a query does not need.

A unit of 512 to 2048 tokens of one kv head is read to one level; the kernel is in `tpu_planes_kernel`, what happens
around it here.

Why words along tokens, channels on lanes. The TPU's memory is tiled by 8 x 128. An array whose last axis is a channel's
32 words (T = 128), or a token's 32 (H = 128), takes 4 times its bytes there, 8 times in the 4-bit planes, unless XLA
exchanges its last two axes. It does: for keys so stored (order "channels", T = 128 or 256, H = 128 or 256) that is the
very layout wanted here, and `swapaxes` costs nothing. But then a channel, or a token, is a lane, and a lane cannot be
skipped; a block can.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_planes_kernel, tpu_planes_unpack
from pallas_kernels.decode_attention.formats import Format, Partial, Planes, shape_of

# By the least tokens of the context: a unit costs about 150 bundles beside its tokens, and is read to the level of the
# most demanding of them.
UNIT_TOKENS = {0: 512, 1 << 15: 1024, 1 << 18: 2048}
CHUNK_UNITS = 8
CHUNK_BYTES = 2**20  # of keys, or of values; four such are held
_LANES = 128


def check(k: Format, v: Format, rotates: bool) -> None:
    """Raises NotImplementedError for what this kernel does not do."""
    if not (isinstance(k, Planes) and isinstance(v, Planes)):
        raise NotImplementedError("keys and values must both be stored in float16 planes.")
    if rotates:
        raise NotImplementedError("planes are stored after RoPE.")
    if k.limits is not None:
        raise NotImplementedError("keys are read by `levels`; `limits` are on probabilities, for values.")
    if (k.order, v.order) != ("channels", "words"):
        raise NotImplementedError(
            f'keys in order "{k.order}" and values in "{v.order}"; done are keys in "channels", values in "words".'
        )
    tokens, channels = shape_of(k)[4:]
    if tokens not in (128, 256) or channels % _LANES:
        raise NotImplementedError(
            f"planes of {tokens} tokens and {channels} channels would be copied whole in each step; XLA lays them out "
            "as this kernel reads them with 128 or 256 tokens and whole rows of 128 channels."
        )


def run(k: Format) -> int:
    """Blocks that are read to one level."""
    *_, blocks, _, tokens, channels = shape_of(k)
    return units(tokens, blocks, channels)[0]


def units(tokens: int, blocks: int, channels: int) -> tuple[int, int, int]:
    """Blocks per unit, units of the context, and units per chunk.

    At least four chunks where there are enough units, so that reading overlaps with computing.
    """
    wanted = max(size for start, size in UNIT_TOKENS.items() if blocks * tokens >= start)
    size = min(wanted // tokens, blocks)
    count = -(-blocks // size)
    fit = CHUNK_BYTES // (2 * size * tokens * channels)
    return size, count, max(1, min(CHUNK_UNITS, count // 4, fit))


def attend_in_part(
    q: jax.Array,
    k: Planes,
    v: Planes,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    chip: str = "",
    interpret: Any = False,
) -> tuple[Partial, jax.Array]:
    """As `api.attend_in_part`."""
    L, B, N, K, T, H = shape_of(k)
    G = q.shape[2]
    rows = -(-G // 8) * 8
    size, count, per_chunk = units(T, N, H)
    if not k.run == v.run == size:
        raise ValueError(f"`run={k.run}` of `k` and {v.run} of `v` must be the {size} blocks that are read together.")
    padded = -(-count // per_chunk) * per_chunk

    def per_unit(x: jax.Array, least: Any) -> jax.Array:
        """Rules `[R, B, U, K]` to `[B, K, R, padded]`."""
        return jnp.pad(x.transpose(1, 3, 0, 2), ((0, 0), (0, 0), (0, 0), (0, padded - count)), constant_values=least)

    key_levels = per_unit(k.levels[None], 0)
    online = v.levels is None
    value_rule = per_unit(v.limits, jnp.inf) if online else per_unit(v.levels[None], 0)
    known = jnp.full((B, K, G), tpu_planes_kernel.EMPTY, jnp.float32) if v.known is None else v.known
    # Rows that pad the group must not ask for anything.
    known = jnp.pad(known, ((0, 0), (0, 0), (0, rows - G)), constant_values=-tpu_planes_kernel.EMPTY)
    known = jnp.broadcast_to(known[..., None], (B, K, rows, _LANES))
    bf16 = chip in ("v6e", "7x")
    q = jnp.pad(q.astype(jnp.float32) / tpu_planes_unpack.scale(bf16), ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    # reduce_precision, for XLA may take a conversion to bfloat16 and back for nothing.
    high = jax.lax.reduce_precision(q, 8, 7)
    q = jnp.concatenate([high, q - high], axis=2).astype(jnp.bfloat16)
    k_planes = tuple(p.swapaxes(-1, -2) for p in k.planes)

    def mine(*shape: int, space: Any = pltpu.VMEM) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h, *_: (b, h, 0, 0), memory_space=space)

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    buffers = [pltpu.VMEM((2, per_chunk, size, *p.shape[-2:]), jnp.uint32) for p in k_planes]
    semaphores = pltpu.SemaphoreType.DMA((2, per_chunk, 3))
    statistic = pltpu.VMEM((rows, _LANES), jnp.float32)
    kernel = functools.partial(tpu_planes_kernel.run, blocks=N, tokens=T, online=online, bf16=bf16)
    acc, top, total, read = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K),
            in_specs=[
                mine(1, padded, space=pltpu.SMEM),
                mine(value_rule.shape[2], padded, space=pltpu.SMEM),
                mine(2 * rows, H),
                mine(rows, _LANES),
                *[hbm] * 6,
            ],
            out_specs=[mine(rows, H), mine(rows, _LANES), mine(rows, _LANES), mine(1, padded, space=pltpu.SMEM)],
            scratch_shapes=[
                buffers,
                buffers,
                pltpu.VMEM((2, per_chunk, rows, size * T), jnp.float32),
                pltpu.VMEM((per_chunk, rows, _LANES), jnp.float32),
                pltpu.SMEM((2, per_chunk), jnp.int32),
                [*[statistic] * 4, pltpu.VMEM((2 * rows, H), jnp.float32)],
                semaphores,
                semaphores,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, rows, _LANES), jnp.float32),
            jax.ShapeDtypeStruct((B, K, rows, _LANES), jnp.float32),
            jax.ShapeDtypeStruct((B, K, 1, padded), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), disable_bounds_checks=True),
        interpret=interpret,
        name="decode_planes",
    )(
        *(x.astype(jnp.int32).reshape(-1) for x in (jnp.clip(layer, 0, L - 1), first, last)),
        *(key_levels, value_rule, q, known, *k_planes, *v.planes),
    )
    return Partial(acc[:, :, :G], top[:, :, :G, 0], total[:, :, :G, 0]), read[:, :, 0, :count].swapaxes(1, 2)
