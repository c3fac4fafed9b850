"""Decode attention on CPU, compiled by numba: packed words are read once, and what is decoded never leaves registers.

XLA on CPU fuses neither unpacking nor look-ups into a product, so that jnp (`xla_cpu`) writes every decoded tile to
memory and reads it several times. Here one loop takes a block of a head from packed words to softmax sums. A call is
shared out over XLA's threads by rows, heads and splits of the context.

What decides the speed (AVX-512, 128 channels, 4 queries; CPU time for keys and values of 32,768 tokens and 8 heads):

* Numbers meet all queries where they are looked up. Through tiles in the first-level cache, with sums of 16 lanes made
  one by one, kvquant3 took 21 ms, kvquant4 19 and kivi4 17, and without the next point they still do.
* The next block of a head is asked for while this one is read, register by register: blocks of a few KiB lie too far
  apart for the processor to foresee. kvquant3 22 -> 14.5, kvquant4 20 -> 13.8, kivi4 18 -> 11; bf16 19 as before.
* Levels are looked up by permutations of a register (`numba_vectors`). With AVX2's kvquant4 takes 18 ms; with a tree of
  selects and registers of 4 lanes 50.
* Tables of cos and sin for 32, 64 or 128 tokens: the same time, so one for a block's tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numba import carray, float32

from pallas_kernels import packing
from pallas_kernels.decode_attention import plane_blocks
from pallas_kernels.decode_attention.formats import (
    Affine,
    Codebook,
    Format,
    Partial,
    Planes,
    Rotation,
    describe,
    joined_heads,
    shape_of,
)
from pallas_kernels.decode_attention.numba_constants import At, arrays_of, floats_at, integers_at
from pallas_kernels.decode_attention.numba_keys import keys
from pallas_kernels.decode_attention.numba_planes import plane_keys, plane_values
from pallas_kernels.decode_attention.numba_rotation import digits, leave_queries, rotation_angles, turn_queries
from pallas_kernels.decode_attention.numba_softmax import EMPTY, soften
from pallas_kernels.decode_attention.numba_values import values
from pallas_kernels.decode_attention.numba_vectors import SMALLEST
from pallas_kernels.decode_attention.xla_cpu import cores
from pallas_kernels.native_cpu import free, malloc, operation, pointer

ITEMS_PER_CORE = 4  # so that cores finish together


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, for what only other backends have."""
    if joined_heads(k) > 1:
        raise NotImplementedError("numba_cpu does not read heads side by side, which are for TPU")
    if isinstance(k, Planes) or isinstance(v, Planes):
        reasons = ((k, _planes_refusal(k, v, rotates)),)
    else:
        reasons = ((k, _keys_refusal(k, rotates)), (v, _values_refusal(v)))
    for fmt, why in reasons:
        if why:
            raise NotImplementedError(f"numba_cpu does not read {describe(fmt)}: {why}")


def _planes_refusal(k: Format, v: Format, rotates: bool) -> str:
    """Why not, or nothing."""
    if why := plane_blocks.refusal(k, v):
        return why
    if rotates:
        return "it does not rotate them"
    return _width_refusal(shape_of(k)[5]) or _width_refusal(shape_of(k)[4] // 8)


def _keys_refusal(k: Format, rotates: bool) -> str:
    """Why not, or nothing."""
    part = shape_of(k)[5] // (2 if rotates else 1)
    if isinstance(k, Affine):
        fields = packing.codes_per_cell(k.bits)
        if rotates:
            return "it does not rotate uniform codes"
        if k.along == "tokens" and fields % k.groups:
            return f"{k.groups} groups of tokens do not divide the {fields} fields of a cell"
        part //= 1 if k.along == "tokens" else k.groups
    if isinstance(k, Codebook) and k.per == "token" and rotates:
        return "it does not rotate keys with a scale per token"
    return _width_refusal(part)


def _values_refusal(v: Format) -> str:
    """Why not, or nothing."""
    if (isinstance(v, Affine) and v.along == "tokens") or (isinstance(v, Codebook) and v.per == "channel"):
        return "scales of values are taken per token"
    return _width_refusal(shape_of(v)[5] // (v.groups if isinstance(v, Affine) else 1))


def _width_refusal(channels: int) -> str:
    return "" if channels % SMALLEST == 0 else f"{channels} channels at a time do not fill registers of {SMALLEST}"


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
    *,
    chip: str = "",
    interpret: Any = False,
) -> Partial:
    """As `api.decode_attention`, in float32; `chip` and `interpret` are ignored."""
    return _attend(q, k, v, layer, first, last, rotation)[0]


def run(k: Format) -> int:
    """Blocks of planes that are read to one level."""
    del k
    return 1


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
    """As `api.attend_in_part`, in float32; `chip` and `interpret` are ignored."""
    plane_blocks.check_runs(k, v)
    if v.limits is not None and v.known is None:
        v = dataclasses.replace(v, known=jnp.full(q.shape[:3], EMPTY, jnp.float32))
    partial, levels = _attend(q, k, v, layer, first, last, None)
    # Nothing was written for blocks that are not seen.
    return partial, plane_blocks.where_seen(levels, first, last, shape_of(k)[4])


def _attend(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
) -> tuple[Partial, jax.Array | None]:
    """The attention and, of planes, the levels `[B, N, K]` to which values were read, where any were."""
    L, B, N, K, T, H = shape_of(k)
    G = q.shape[2]
    splits = min(N, -(-ITEMS_PER_CORE * cores() // (B * K)))
    run = _operation(_one_block(k), _one_block(v), G, rotation is not None)
    angles = [] if rotation is None else rotation_angles(rotation, N, T)
    sizes = jnp.asarray([B, N, K, splits, digits(N)], jnp.int32)
    # Compiled code checks no index.
    layer, first, last = jnp.clip(layer, 0, L - 1).reshape(1), jnp.maximum(first, 0), jnp.minimum(last, N * T)
    operands = [sizes, layer, first, last, q, *angles, *arrays_of(k), *arrays_of(v)]
    shapes = [jax.ShapeDtypeStruct((B, K, splits, G, *rest), jnp.float32) for rest in ((H,), (), ())]
    if isinstance(v, Planes):
        shapes.append(jax.ShapeDtypeStruct((B, N, K), jnp.int32))
    acc, top, total, *levels = run(shapes, B * K * splits, *operands)
    return _merged(Partial(acc, top, total)), levels[0] if levels else None


def _merged(parts: Partial) -> Partial:
    """Joins the splits, axis 2."""
    if parts.max.shape[2] == 1:
        return Partial(*(x[:, :, 0] for x in parts))
    top = parts.max.max(2)
    weight = jnp.exp(parts.max - top[:, :, None])
    return Partial((parts.acc * weight[..., None]).sum(2), top, (parts.sum * weight).sum(2))


def _one_block(fmt: Format) -> Format:
    """The format without what its code does not depend on: sizes only, and one layer, row and block of them."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        if x.ndim >= 5:
            return jax.ShapeDtypeStruct((1, 1, 1, *x.shape[3:]), x.dtype)
        # What says how much to read of planes is as large as the context.
        return jax.ShapeDtypeStruct((1,) * x.ndim if isinstance(fmt, Planes) else (1, *x.shape[1:]), x.dtype)

    return jax.tree.map(one, fmt)


@functools.cache
def _operation(k: Format, v: Format, group: int, rotates: bool) -> Callable:
    """The kernel for these formats."""
    *_, T, H = shape_of(k)
    first_key = 8 if rotates else 5
    within = 6 if rotates else 0  # where no angles are, nothing is read there
    first_value = first_key + len(arrays_of(k))
    first_result = first_value + len(arrays_of(v))
    if isinstance(k, Planes):
        scored, added = plane_keys(k, first_key, group), plane_values(v, first_value, group)
    else:
        scored, added = keys(k, first_key, group, rotates), values(v, first_value, group)
    prepare_keys, score, prepare_values, add = scored.prepare, scored.score, added.prepare, added.add
    key_size, value_size = scored.meta_size, added.meta_size
    scratch_size = (2 * group + 1) * H + group * (T + 2) + key_size + value_size
    turn = turn_queries(group, H) if rotates else leave_queries

    def work(buffers, item):
        """One row, head and split of the context."""
        sizes, layer = integers_at(buffers, 0), integers_at(buffers, 1)[0]
        B, N, K, S, count = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
        b, k, s = item // (K * S), item // S % K, item % S
        first, last = integers_at(buffers, 2)[b], integers_at(buffers, 3)[b]
        begin = first // T
        blocks = (last + T - 1) // T - begin if last > first else 0
        scratch = malloc(4 * scratch_size)
        memory = carray(pointer(scratch, float32), (scratch_size,))
        q, memory = memory[: group * H].reshape((group, H)), memory[group * H :]
        acc, memory = memory[: group * H].reshape((group, H)), memory[group * H :]
        scores, memory = memory[: group * T].reshape((group, T)), memory[group * T :]
        angle, memory = memory[:H], memory[H:]
        top, total, memory = memory[:group], memory[group : 2 * group], memory[2 * group :]
        key_meta, value_meta = memory[:key_size], memory[key_size:]
        queries = floats_at(buffers, 4)[(b * K + k) * group * H :][: group * H].reshape((group, H))
        angles = floats_at(buffers, within)[: T * H].reshape((T, H))
        for g in range(group):
            top[g], total[g] = EMPTY, 0
            for h in range(H):
                acc[g, h], q[g, h] = 0, queries[g, h]
        for n in range(begin + blocks * s // S, begin + blocks * (s + 1) // S):
            block = (layer * B + b) * N + n
            own = (b * N + n) * K + k
            at = At(block * K + k, block, layer, layer * K + k, K, own, b * K + k, B * N * K)
            turn(q, queries, angle, b, n, count, buffers)
            prepare_keys(key_meta, buffers, at)
            score(scores, q, angles, key_meta, buffers, at)
            soften(scores, first - n * T, last - n * T, top, total, acc)
            prepare_values(value_meta, buffers, at)
            add(acc, scores, top, total, value_meta, buffers, at)
        for g in range(group):
            place = item * group + g
            for h in range(H):
                floats_at(buffers, first_result)[place * H + h] = acc[g, h]
            floats_at(buffers, first_result + 1)[place] = top[g]
            floats_at(buffers, first_result + 2)[place] = total[g]
        free(scratch)

    return operation(f"decode_attention 1: {k}, {v}, {group}, {rotates}", work)
