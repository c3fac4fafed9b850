"""Tiles of keys or values as float32 out of packed storage, compiled by numba.

A block is decoded a *tile* at a time: a few tokens of one head, in an array that stays in a core's first-level cache.
`reader(fmt)` compiles the functions that do it for a format; what is known then (bits, channels, groups) is a constant
of their code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numba
import numpy as np
from llvmlite import ir
from numba import carray, float32, types, uint8, uint16
from numba.extending import intrinsic

from pallas_kernels import packing
from pallas_kernels.decode_attention.formats import Affine, Codebook, Dense, Format, shape_of
from pallas_kernels.decode_attention.numba_vectors import Row
from pallas_kernels.native_cpu import JIT, address, pointer

ROWS = 8  # of a tile, at most
MANY = 1 << 60  # elements of an array whose size the code does not need


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the tokens of one block and head are decoded.

    Attributes:
      meta_size: of the float32 array `meta`.
      tiles: per block.
      rows: tokens per tile, an even number.
      step: tokens between two rows of a tile.
      prepare: `prepare(meta, buffers, at)`: scales, zeros and levels of a block, as float32.
      read: `read(tile, i, meta, buffers, at) -> first token` of tile i, `[rows, H]` float32.

    `at` says where the block is: its number among all `[L, B, N, K]`, among those that heads share `[L, B, N]`, and the
    number of its layer `[L]` and of its layer and head `[L, K]`.
    """

    meta_size: int
    tiles: int
    rows: int
    step: int
    prepare: Callable
    read: Callable

    @property
    def code(self) -> tuple[Any, ...]:
        return self.prepare, self.read, self.tiles, self.rows, self.step


def arrays_of(fmt: Format) -> list[jax.Array]:
    """What is read of a format, in the order of the compiled functions' `buffers`."""
    if isinstance(fmt, Dense):
        return [fmt.values]
    if isinstance(fmt, Affine):
        return [fmt.codes, fmt.scale, fmt.zero]
    assert isinstance(fmt, Codebook)
    return [fmt.codes, fmt.levels, fmt.scale, fmt.zero] + ([fmt.slot_channel, fmt.slot_residual] if fmt.slots else [])


def reader(fmt: Format, first: int) -> Reader:
    """For a format whose arrays are those from number `first` on."""
    return _dense(fmt, first) if isinstance(fmt, Dense) else _packed(fmt, first)


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


@intrinsic
def bits_of(typing, x):
    return types.int32(types.float32), lambda context, builder, _, args: builder.bitcast(args[0], ir.IntType(32))


@numba.njit(**JIT)
def half(bits):
    """float16 bits as float32; what is not finite becomes finite."""
    # The exponent's bias differs by 112; a product puts subnormal numbers right too.
    value = float_of(shifted_left(bits & np.uint16(0x7FFF), 13)) * np.float32(2.0**112)
    return float_of(bits_of(value) | shifted_left(bits & np.uint16(0x8000), 16))


@numba.njit(**JIT)
def floats(out, bits, brain):
    """16-bit floats as float32; `brain`: bfloat16, else float16."""
    if brain:
        for i in range(out.size):
            out[i] = float_of(shifted_left(bits[i], 16))
    else:
        for i in range(out.size):
            out[i] = half(bits[i])


def _dense(fmt: Dense, first: int) -> Reader:
    *_, T, H = shape_of(fmt)
    brain = fmt.dtype == "bfloat16"

    @numba.njit(**JIT)
    def prepare(meta, buffers, at):
        pass

    @numba.njit(**JIT)
    def read(tile, i, meta, buffers, at):
        bits = carray(pointer(address(buffers, first), uint16), (MANY,))
        start = (at[0] * T + i * ROWS) * H
        for r in range(ROWS):
            floats(tile[r], bits[start + r * H : start + (r + 1) * H], brain)
        return i * ROWS

    return Reader(1, T // ROWS, ROWS, 1, prepare, read)


def _packed(fmt: Affine | Codebook, first: int) -> Reader:
    """Codes in words along tokens; row f of a tile is a field of a cell (`pallas_kernels.packing`)."""
    *_, T, H = shape_of(fmt)
    bits, fields = fmt.bits, packing.codes_per_cell(fmt.bits)
    cells, rows = T // fields, min(ROWS, fields)
    parts = fields // rows
    if isinstance(fmt, Affine):
        per_channel, groups, slots, levels = fmt.along == "tokens", fmt.scale.shape[-2], 0, 0
        prepare = _affine_constants(fmt, first + 1)
    else:
        per_channel, groups, slots, levels = fmt.per == "channel", 1, fmt.slots, 16
        prepare = _codebook_constants(fmt, first + 1)
    width, per_group = (H, T // groups) if per_channel else (T, H // groups)
    size = groups * width
    constants = (0 if per_channel else per_group, width)
    decode = Row(bits, H, levels > 0, False, *constants).compile()
    decode_two = Row(bits, H, levels > 0, True, *constants).compile() if bits == 3 else decode

    @numba.njit(**JIT)
    def read(tile, i, meta, buffers, at):
        """`meta`: scales `[groups, H or T]`, zeros, levels, residuals `[slots, T]`."""
        words = address(buffers, first) + 4 * at[0] * (T * bits // 32) * H
        scales, zeros, table = meta.ctypes.data, meta[size:].ctypes.data, meta[2 * size :].ctypes.data
        cell, field = i // parts, (i % parts) * rows
        for r in range(rows):
            bit, token = (field + r) * bits, (field + r) * cells + cell
            word, right = words + 4 * ((bit >> 5) * cells + cell) * H, bit & 31
            constant = 4 * (token // per_group * H if per_channel else token)
            out, scale, zero = tile[r].ctypes.data, scales + constant, zeros + constant
            if right + bits <= 32:
                decode(out, word, word, np.uint32(right), np.uint32(0), table, scale, zero)
            else:  # 3 bits: the rest is in the cell's next word
                after = word + 4 * cells * H
                decode_two(out, word, after, np.uint32(right), np.uint32(32 - right), table, scale, zero)
        if slots:
            channels = carray(pointer(address(buffers, first + 4), uint8), (MANY,))[at[0] * slots * T :]
            residuals = meta[2 * size + levels :]
            for s in range(slots):
                for r in range(rows):
                    slot = s * T + (field + r) * cells + cell
                    tile[r, channels[slot]] += residuals[slot]
        return field * cells + cell

    return Reader(2 * size + levels + slots * T, cells * parts, rows, cells, prepare, read)


def _affine_constants(fmt: Affine, first: int) -> Callable:
    shared, brain = fmt.scale.shape[3] == 1 and fmt.codes.shape[3] > 1, fmt.dtype == "bfloat16"
    size = fmt.scale.shape[-2] * fmt.scale.shape[-1]

    @numba.njit(**JIT)
    def prepare(meta, buffers, at):
        block = at[1] if shared else at[0]
        for n in range(2):
            numbers = carray(pointer(address(buffers, first + n), uint16), (MANY,))
            floats(meta[n * size : (n + 1) * size], numbers[block * size : (block + 1) * size], brain)

    return prepare


def _codebook_constants(fmt: Codebook, first: int) -> Callable:
    per_channel, count, size, T = fmt.per == "channel", 2**fmt.bits, fmt.scale.shape[-1], shape_of(fmt)[4]
    slots = fmt.slots

    @numba.njit(**JIT)
    def prepare(meta, buffers, at):
        for n in range(2):
            out = meta[n * size : (n + 1) * size]
            if per_channel:
                fitted = carray(pointer(address(buffers, first + 1 + n), float32), (MANY,))
                for h in range(size):
                    out[h] = fitted[at[3] * size + h]
            else:
                numbers = carray(pointer(address(buffers, first + 1 + n), uint16), (MANY,))
                floats(out, numbers[at[1] * size : (at[1] + 1) * size], False)
        levels = carray(pointer(address(buffers, first), float32), (MANY,))
        for j in range(16):
            meta[2 * size + j] = levels[at[2] * count + j % count]
        if slots:
            residuals = carray(pointer(address(buffers, first + 4), uint16), (MANY,))[at[0] * slots * T :]
            floats(meta[2 * size + 16 :], residuals[: slots * T], False)

    return prepare
