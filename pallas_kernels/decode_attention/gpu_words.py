"""Packed codes of one chunk in shared memory, on Hopper: how words get to registers and planes out of them.

Words lie as `[run, R, channels]` in rows of 128 bytes, swizzled by the copy engine. What the tensor cores sum over may
come in any order, if both operands agree, and so may rows of a tile, if whoever reads the result knows; both orders are
chosen so that a thread reads 8 or 16 neighbouring bytes and a warp every bank once (twice where R is 4).
"""
# (It checks against the oldest JAX admitted, which lacks what this file is written for.)

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.decode_attention.gpu_skeleton import At, Plan, flat
from pallas_kernels.decode_attention.gpu_tiles import ROWS, WGMMA

f16, u16, u32 = jnp.float16, jnp.uint16, jnp.uint32


def contract(x: jax.Array) -> jax.Array:
    """Channels, the last axis, in the order in which products of keys and queries sum over them: of every 32, a
    thread's eight lie side by side in memory."""
    *lead, channels = x.shape
    n = len(lead)
    x = x.reshape(*lead, channels // 32, 4, 2, 2, 2)  # thread of four, step, half of a step, odd
    return x.transpose(*range(n), n, n + 2, n + 3, n + 1, n + 4).reshape(*lead, channels)


def value_rows(x: Any) -> Any:
    """Channels, the first axis, in the order of the rows of tiles of values: a thread has two neighbours."""
    channels, *rest = x.shape
    x = x.reshape(-1, 4, 8, 2, *rest)  # tile, warp, lane, half of a warp's rows
    return x.transpose(0, 1, 3, 2, *range(4, x.ndim)).reshape(channels, *rest)


def value_channel(row: Any, tile: int) -> Any:
    """The channel in a row of a tile of values; `row` is anything that knows `+ * // %`."""
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2 + ROWS * tile


class Place(NamedTuple):
    """Where the codes of a plane are: a tile, a half of its words (0 low), how far they must come down to lie in the
    low 10 bits of the half (or could not stay where they are), and their lowest bit then."""

    tile: int
    half: int
    down: int
    shift: int


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of `bits`-bit codes, `[slots, word_rows / R, run, R, channels]`, and the planes in them."""

    plan: Plan
    bits: int

    @property
    def tiles(self) -> int:
        return self.plan.tokens * self.bits // 32 // self.plan.rows

    @property
    def transforms(self):
        return plgpu.TilingTransform((self.plan.rows, 32)), plgpu.SwizzleTransform(128)

    def scratch(self):
        p = self.plan
        return plgpu.SMEM((p.slots, self.tiles, p.run, p.rows, p.channels), u32, transforms=self.transforms)

    def array(self, codes: jax.Array) -> jax.Array:
        """`[L, B, N, K, W, H]` as `fetch` takes it: `[L * B * N, K * tiles, R, H]`."""
        codes = flat(self.plan, codes)
        return codes.reshape(codes.shape[0], -1, self.plan.rows, codes.shape[-1])

    def copies(self) -> int:
        return self.tiles

    def fetch(self, array, here, at: At, slot, barrier) -> None:
        p = self.plan
        for tile in range(self.tiles):
            source = array.at[at.blocks(p), at.head * self.tiles + tile]
            plgpu.copy_gmem_to_smem(source, here.at[slot, tile], barrier)

    def place(self, plane: int) -> Place:
        field, tile = divmod(plane, self.tiles)
        half, bit = divmod(field * self.bits, 16)
        shift = bit % (10 // self.bits * self.bits)
        return Place(tile, half, bit - shift, shift)

    def halves(self, planes: Sequence[int]) -> dict:
        """`tile -> halves` of its words that planes are in."""
        wanted: dict[int, dict] = {}
        for place in map(self.place, planes):
            wanted.setdefault(place.tile, {})[place.half] = None
        return {tile: tuple(halves) for tile, halves in wanted.items()}

    def field(self, half: jax.Array, place: Place) -> jax.Array:
        """The codes of a plane, shifted left by `place.shift`, in 16 bits."""
        if place.down:
            half = _down(half, place.down, self.plan.interpret)
        return half & u16(((1 << self.bits) - 1) << place.shift)

    def keys(self, ref, halves: tuple[int, ...], part: range) -> list:
        """The halves of the words `ref[run, R, H]` as tiles `[64, channels of part]` ordered by `contract`.

        In groups, the rows of a group take its bytes of the same words: of each half or quarter the low 16 bits.
        """
        p = self.plan
        if p.interpret:
            words = contract(ref[...].reshape(-1, p.channels))[:, part.start : part.stop]
            if p.groups > 1:
                return [jnp.concatenate([self.part(words, i) for i in range(p.groups)])]
            return [(words >> u32(16 * x)).astype(u16) for x in halves]

        def registers(pointer, t: Thread) -> list:
            out = []
            own, group = t.warp % (4 // p.groups), t.warp // (4 // p.groups)
            row = own * 16 + t.lane8
            for line in range(part.start // 32, part.stop // 32):
                odd = line % self.turn
                for step in range(2):
                    start = self.start(pointer, row, odd, 2 * t.j + step, 0)
                    far = (line - odd) * p.rows
                    four = [start.load(far + self.down(i), 4, again=True) for i in range(2)]
                    out += [_pair(four[i], 2 * h, four[i], 2 * h + 1) for h in range(2) for i in range(2)]
            return [_halves(out, group * (4 // p.groups) if p.groups > 1 else 2 * x) for x in halves]

        return self.read(ref, (ROWS, len(part)), registers, len(halves))

    def values(self, ref, tile: int, halves: tuple[int, ...]) -> list:
        """Halves of `ref[run, R, H]`, transposed: channels 64 * tile and on, `[64, 64]`, in the order of `value_rows`.
        Channels beyond the last repeat others."""
        p = self.plan
        if p.interpret:
            words = jnp.pad(ref[...].reshape(-1, p.channels).T, ((0, p.padded - p.channels), (0, 0)))
            words = value_rows(words)[ROWS * tile : ROWS * (tile + 1)]
            if p.groups > 1:
                return [jnp.concatenate([self.part(words, i) for i in range(p.groups)], axis=1)]
            return [(words >> u32(16 * x)).astype(u16) for x in halves]
        lines = p.channels // 32

        def registers(pointer, t: Thread) -> list:
            out = []
            line = t.warp // 2 if 2 * tile + 1 < lines else 0
            for step in range(4 // p.groups):
                for h in range(2):
                    loaded = []
                    for e in range(2):
                        chunk = t.warp % 2 * 4 + t.lane8 // 2
                        start = self.start(pointer, t.j * 2 + e, line + 2 * tile % self.turn, chunk, t.lane8 % 2 * 2)
                        far = (2 * tile - 2 * tile % self.turn) * p.rows
                        loaded.append(start.load(far + self.down(2 * step + h), 2))
                    out += [_pair(loaded[0], i, loaded[1], i) for i in range(2)]
            if p.groups > 1:
                return [[x for i in range(0, 4, 4 // p.groups) for x in _halves(out, i)]]
            return [_halves(out, 2 * x) for x in halves]

        return self.read(ref, (ROWS, ROWS), registers, len(halves))

    def part(self, words: jax.Array, group: int) -> jax.Array:
        """Of `words`, the 16 bits from which the rows of a group take their codes."""
        return (words >> u32(32 // self.plan.groups * group)).astype(u16)

    @property
    def turn(self) -> int:
        """Lines of 32 channels after which the swizzle is the same again."""
        return max(1, 8 // self.plan.rows)

    def start(self, pointer, row: "_Int", line, chunk: "_Int", word) -> "_Start":
        """Of line `line` (32 words) of row `row` of a tile, 16-byte chunk `chunk`, word `word`. All that varies between
        threads; what does not is added by `_Start.load` as an immediate, or the addresses would fill registers."""
        rows, lines = self.plan.rows, self.plan.channels // 32
        at = row // rows * (lines * rows) + row % rows + line * rows
        return _Start(pointer, at * 32 + (chunk ^ at % 8) * 4 + word)

    def down(self, eights: int) -> int:
        """Lines from a row to that 8 * eights further down the tile."""
        rows, lines = self.plan.rows, self.plan.channels // 32
        return 8 * eights // rows * lines * rows + 8 * eights % rows

    def read(self, ref, shape, registers, count: int) -> list:
        out = plgpu.ShapeDtypeStruct(shape, u16, layout=WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(self.transforms),), return_type=[out] * count)
        def read(_, ref):
            tiles = registers(mgpu.utils.memref_ptr(ref), Thread())
            return [fragment(x, shape, WGMMA, False) for x in tiles]

        return read(ref)


def fragment(registers: list, shape, layout, signed):
    """Registers of this thread, in the layout's order, as a Mosaic array."""
    array = np.empty(len(registers), dtype=object)
    array[:] = registers
    fragmented = layout.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=array.reshape(fragmented.registers_shape(shape)), _layout=fragmented, _is_signed=signed
    )


class _Int:
    """A 32-bit unsigned number of the generated program."""

    def __init__(self, value):
        self.value = value

    def _apply(self, operation, other):
        if not isinstance(other, _Int):
            other = _Int(arith.constant(ir.IntegerType.get_signless(32), other))
        return _Int(operation(self.value, other.value))

    def __add__(self, other):
        return self._apply(arith.addi, other)

    def __mul__(self, other):
        return self._apply(arith.muli, other)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other):
        return self._apply(arith.divui, other)

    def __mod__(self, other):
        return self._apply(arith.remui, other)

    def __xor__(self, other):
        return self._apply(arith.xori, other)


class _Start:
    def __init__(self, pointer, words: _Int):
        self.pointer = mgpu.utils.getelementptr(pointer, [words.value], ir.IntegerType.get_signless(32))

    def load(self, lines: float, count: int, again: bool = False):
        """`count` words, `lines` lines of 32 further; `again`: even if loaded before, not kept in registers."""
        i32 = ir.IntegerType.get_signless(32)
        pointer = mgpu.utils.getelementptr(self.pointer, [int(lines * 32)], i32)
        return llvm.load(ir.VectorType.get((count,), i32), pointer, alignment=4 * count, volatile_=again)


class Thread:
    """Indices of this thread within its warpgroup; in a tile it holds rows 16 * warp + lane8 + (0, 8)."""

    def __init__(self):
        thread = _Int(mgpu.utils.thread_idx()) % 128
        self.warp, lane = thread // 32, thread % 32
        self.lane8, self.j = lane // 4, lane % 4


def spread(plan: Plan, ref, slot, group: int, plane: int, part: range) -> jax.Array:
    """float16 scales `ref[slots, run, T/group, H]` for a plane: `[64, channels of part]`, ordered by `contract`."""
    rows, channels = plan.rows, plan.channels
    if plan.interpret:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        tile = ref[slot][plan.block(row), plan.token_in_block(row, plane) // group]
        return jax.lax.bitcast_convert_type(contract(tile)[:, part.start : part.stop], f16)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((ROWS, len(part)), f16, layout=WGMMA)
    )
    def read(_, ref):
        t, pointer = Thread(), mgpu.utils.memref_ptr(ref)
        f16x2 = ir.VectorType.get((2,), ir.F16Type.get())
        pairs = channels // 2  # 32-bit words in a row
        groups = plan.tokens // group
        loaded = []
        for i in range(2):
            if i and rows >= 16 and rows <= group:
                loaded.append(loaded[0])
                continue
            row = t.warp * 16 + t.lane8 + 8 * i
            at = plan.block(row) * groups + plan.token_in_block(row, plane) // group
            start = _Start(pointer, at * pairs + t.j * 4)
            loaded.append([start.load(line / 2, 4) for line in range(part.start // 32, part.stop // 32)])
        out = []
        for line in range(len(part) // 32):
            for four in range(4):
                out += [mgpu.utils.bitcast(vector.extract(x[line], [], [four]), f16x2) for x in loaded]
        return fragment(out, (ROWS, len(part)), WGMMA, None)

    return read(ref.at[slot])


def _pair(a, i: int, b, j: int):
    return vector.extract(a, [], [i]), vector.extract(b, [], [j])


def _halves(pairs: list, byte) -> list:
    """The 16 bits of both words of each pair from a byte on, a number of this or of the generated program, as one
    register; what is beyond a word is not zero."""
    select = _Int(arith.constant(ir.IntegerType.get_signless(32), 0x5410)) + byte * 0x1111
    out_type = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
    # Bytes 0 to 3 are the first operand's, whatever `prmt` calls it.
    return [mgpu.utils.bitcast(mgpu.utils.prmt(low, high, select.value), out_type) for low, high in pairs]


def _down(x: jax.Array, bits: int, interpret) -> jax.Array:
    """Both 16-bit halves of each register shifted at once (the GPU has no 16-bit shift); what the upper drags into the
    lower lies above its bit 16 - `bits`, and the caller masks it."""
    if interpret:
        return x >> u16(bits)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(x.shape, u16, layout=WGMMA))
    def shift(_, x):
        i32 = ir.IntegerType.get_signless(32)
        out_type = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        words = [arith.shrui(mgpu.utils.bitcast(r, i32), arith.constant(i32, bits)) for r in x.registers.flat]
        return fragment([mgpu.utils.bitcast(w, out_type) for w in words], x.shape, WGMMA, False)

    return shift(x)
