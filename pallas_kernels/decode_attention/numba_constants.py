"""Scales, zeros, levels and slots of a block as float32, compiled by numba: `meta`, one after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numba
import numpy as np
from llvmlite import ir
from numba import carray, float32, int32, int64, types, uint16
from numba.extending import intrinsic

from pallas_kernels.decode_attention.formats import Affine, Codebook, Dense, Format, Planes, shape_of
from pallas_kernels.native_cpu import JIT, address, pointer

MANY = 1 << 60  # elements of an array whose size the code does not need
BIAS = (127 - 15) << 23  # between the exponents of float16 and float32
LEVELS = 16  # of a codebook, repeated to so many


class At(NamedTuple):
    """Where a block is, in compiled code.

    Attributes:
      block: its number among all `[L, B, N, K]`.
      shared: among those that heads share, `[L, B, N]`.
      layer, layer_head: the number of its layer `[L]`, and of its layer and head `[L, K]`.
      heads: K, blocks from a head's to its next one.
      own: its number within the layer, `[B, N, K]`.
      row_head: that of its row and head, `[B, K]`.
      count: blocks of a layer.
    """

    block: int
    shared: int
    layer: int
    layer_head: int
    heads: int
    own: int
    row_head: int
    count: int


@dataclasses.dataclass(frozen=True)
class Constants:
    """What stands in `meta`.

    Attributes:
      per: what a scale and a zero belong to; nothing where there are none.
      groups: of tokens or channels, each with `size` scales, and then as many zeros.
      levels: after them.
      slots: residuals `[slots, T]` after these.
      total: elements of `meta`.
      prepare: `prepare(meta, buffers, at)` writes them.
    """

    per: str
    groups: int
    size: int
    levels: int
    slots: int
    total: int
    prepare: Callable


def arrays_of(fmt: Format) -> list[jax.Array]:
    """What is read of a format, in the order of the compiled functions' `buffers`."""
    if isinstance(fmt, Dense):
        return [fmt.values]
    if isinstance(fmt, Affine):
        return [fmt.codes, fmt.scale, fmt.zero]
    if isinstance(fmt, Planes):
        return [*fmt.planes, *([fmt.levels] if fmt.limits is None else [fmt.limits, fmt.known])]
    assert isinstance(fmt, Codebook)
    return [fmt.codes, fmt.levels, fmt.scale, fmt.zero] + ([fmt.slot_channel, fmt.slot_residual] if fmt.slots else [])


def constants(fmt: Format, first: int) -> Constants:
    """Of a format whose arrays are those from number `first` on."""
    if isinstance(fmt, Dense):
        return Constants("", 0, 0, 0, 0, 0, _nothing)
    if isinstance(fmt, Affine):
        *_, groups, size = fmt.scale.shape
        per = "channel" if fmt.along == "tokens" else "token"
        return Constants(per, groups, size, 0, 0, 2 * groups * size, _of_affine(fmt, first + 1))
    assert isinstance(fmt, Codebook)
    size = fmt.scale.shape[-1]
    total = 2 * size + LEVELS + fmt.slots * shape_of(fmt)[4]
    return Constants(fmt.per, 1, size, LEVELS, fmt.slots, total, _of_codebook(fmt, first + 1))


# With signatures: else these are compiled anew for each number that stands where they are called.
@numba.njit(float32[::1](int64, int64), **JIT)
def floats_at(buffers, i):
    """Operand or result number i."""
    return carray(pointer(address(buffers, i), float32), (MANY,))


@numba.njit(int32[::1](int64, int64), **JIT)
def integers_at(buffers, i):
    return carray(pointer(address(buffers, i), int32), (MANY,))


def _bits(build: Callable) -> Any:
    """A function of two uint32 with an int32 result; numba's own operators make 64 bits of 32."""

    def typed(typing, a, b):
        return types.int32(types.uint32, types.uint32), lambda context, builder, _, args: build(builder, *args)

    return intrinsic(typed)


shifted_left = _bits(ir.IRBuilder.shl)


@intrinsic
def float_of(typing, bits):
    """The float32 whose bits these are."""
    return types.float32(types.int32), lambda context, builder, _, args: builder.bitcast(args[0], ir.FloatType())


@numba.njit(**JIT)
def half(bits):
    """float16 bits as float32; what is not finite becomes finite."""
    # Subnormal ones as integers: XLA's threads take subnormal float32 for 0.
    size = bits & np.uint16(0x7FFF)
    small = np.float32(size) * np.float32(2.0**-24)
    value = small if size < 0x400 else float_of(np.int32(shifted_left(size, 13) + BIAS))
    return -value if bits & np.uint16(0x8000) else value


@numba.njit(**JIT)
def floats(out, bits, brain):
    """16-bit floats as float32; `brain`: bfloat16, else float16."""
    if brain:
        for i in range(out.size):
            out[i] = float_of(shifted_left(bits[i], 16))
    else:
        for i in range(out.size):
            out[i] = half(bits[i])


@numba.njit(**JIT)
def _nothing(meta, buffers, at):
    """Numbers are stored as they are."""


def _of_affine(fmt: Affine, first: int) -> Callable:
    shared, brain = fmt.scale.shape[3] == 1 and fmt.codes.shape[3] > 1, fmt.dtype == "bfloat16"
    size = fmt.scale.shape[-2] * fmt.scale.shape[-1]

    @numba.njit(**JIT)
    def prepare(meta, buffers, at):
        block = at.shared if shared else at.block
        for n in range(2):
            numbers = carray(pointer(address(buffers, first + n), uint16), (MANY,))
            floats(meta[n * size : (n + 1) * size], numbers[block * size : (block + 1) * size], brain)

    return prepare


def _of_codebook(fmt: Codebook, first: int) -> Callable:
    per_channel, count, size, T = fmt.per == "channel", 2**fmt.bits, fmt.scale.shape[-1], shape_of(fmt)[4]
    slots = fmt.slots

    @numba.njit(**JIT)
    def prepare(meta, buffers, at):
        for n in range(2):
            out = meta[n * size : (n + 1) * size]
            if per_channel:
                fitted = floats_at(buffers, first + 1 + n)
                for h in range(size):
                    out[h] = fitted[at.layer_head * size + h]
            else:
                numbers = carray(pointer(address(buffers, first + 1 + n), uint16), (MANY,))
                floats(out, numbers[at.shared * size : (at.shared + 1) * size], False)
        levels = floats_at(buffers, first)
        for j in range(LEVELS):
            meta[2 * size + j] = levels[at.layer * count + j % count]
        if slots:
            residuals = carray(pointer(address(buffers, first + 4), uint16), (MANY,))[at.block * slots * T :]
            floats(meta[2 * size + LEVELS :], residuals[: slots * T], False)

    return prepare
