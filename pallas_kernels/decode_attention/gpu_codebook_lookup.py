"""Codes to levels in registers on Hopper, by byte permutes: any table of 4, 8 or 16 float16 levels, exactly.

`prmt` picks four bytes out of the eight of two registers, by the low three bits of the four low nibbles of a third. A
table of eight levels is two such pairs, of low and of high bytes; one of sixteen is two tables and a choice by the top
bit, which is again a `prmt`. Two words that are neighbours in a row of the `mma` operand are decoded together, so that
a nibble of one and a nibble of the other share a byte, and a low and a high byte permute back to a pair of float16.

`decode_pair` runs on `Word` (registers of the generated program) and, for tests, on anything else that knows
`& | << >>` and a byte permute. Instructions per element: 1.4 at 2 bits, 2.2 at 3 bits and 2.9 at 4 bits; a polynomial
through the levels takes 2.5 at 2 bits and rounds on the way.

Where there is room, a byte of codes, or two codes of 3 bits, are rather looked up as a whole, in a table in shared
memory that has its content once for each bank, so that no two lanes of a warp meet (`shared_tables`): 1.0, 2.0 and 1.5
instructions per element at 2, 3 and 4 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

FIELDS = {2: 16, 3: 8, 4: 8}  # codes in one prepared word: at 3 bits, 24 bits of the 96 of a cell
U32 = np.uint32
TOGETHER = {2: 4, 3: 2, 4: 2}  # codes looked up at once in shared memory
ROWS = {bits: 1 << bits * n for bits, n in TOGETHER.items()}  # of a table there
REGISTERS = {2: 2, 3: 4, 4: 8}  # that hold a table


def tables(levels: jax.Array) -> jax.Array:
    """Registers of `levels[L, 2**bits]` float32 as float16: uint32 `[L, 8]`, four levels each, all low bytes and then
    all high ones; what is left is 0."""
    bits = lax.bitcast_convert_type(levels.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)
    halves = jnp.concatenate([bits & 0xFF, bits >> 8], 1)
    table = halves[:, ::4] | (halves[:, 1::4] << 8) | (halves[:, 2::4] << 16) | (halves[:, 3::4] << 24)
    return jnp.pad(table, ((0, 0), (0, 8 - table.shape[1])))


def together(planes: range, bits: int) -> list[list[int]]:
    """Planes by the fields that share the most work; a few at a time keeps registers free."""
    step = {2: 4, 3: 2, 4: 2}[bits]
    return [[p for p in planes if p % step == r] for r in range(step)]


def decoders(bits: int, planes: range, table, which: int, shared: bool, layout, interpret) -> list:
    """Planes that are decoded together, and how: `decode(words) -> [tile of levels per plane]`.

    Args:
      table: a ref of `tables` of keys and values, or, where `shared`, of `shared_tables`.
      which: 0 keys', 1 values'.
    """
    if not shared:
        registers = [table[which, i] for i in range(REGISTERS[bits])]

        def in_registers(group):
            return lambda words: lookup(words, registers, bits, group, layout, interpret)

        return [(group, in_registers(group)) for group in together(planes, bits)]
    step = TOGETHER[bits]

    def by_part(group):
        return lambda words: lookup_shared(words, table, which, bits, group[0] // step, layout, interpret)

    groups = [list(planes[i : i + step]) for i in range(0, len(planes), step)]
    return [(group, by_part(group)) for group in groups]


def lookup(words: jax.Array, table: list, bits: int, fields: list[int], layout, interpret) -> list[jax.Array]:
    """float16 levels of `fields` of `words[M, N]`, a tile `[M, N]` each.

    Args:
      words: uint32; at 3 bits eight codes in the low 24 bits, otherwise whole words.
      table: uint32 scalars, of a row of `tables`.
      layout: of the tile: one in which a thread holds pairs of columns.
    """
    if interpret:
        bytes_ = [(t >> (8 * i)) & 0xFF for t in table for i in range(4)]
        half = len(bytes_) // 2
        levels = jnp.stack([low | (high << 8) for low, high in zip(bytes_[:half], bytes_[half:])])
        found = [levels[((words >> (bits * f)) & (2**bits - 1)).astype(jnp.int32)] for f in fields]
        return [lax.bitcast_convert_type(x.astype(jnp.uint16), jnp.float16) for x in found]
    out = plgpu.ShapeDtypeStruct(words.shape, jnp.float16, layout=layout)
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(layout, (scalar,) * len(table)), return_type=(out,) * len(fields))
    def decode(_, words, table):
        registers = [np.empty(words.registers.shape, dtype=object) for _ in fields]
        table = [Word(t.registers.item()) for t in table]
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        for i in np.ndindex(words.registers.shape):
            w0, w1 = (Word(_element(words.registers[i], j)) for j in (0, 1))
            found = decode_pair(w0, w1, table, bits, prmt)
            for out, f in zip(registers, fields):
                out[i] = llvm.bitcast(pair, found[f].value)
        return tuple(mgpu.FragmentedArray(_registers=r, _layout=words.layout, _is_signed=None) for r in registers)

    return list(decode(words, tuple(table)))


def shared_tables(keys: jax.Array, values: jax.Array) -> jax.Array:
    """What neighbouring codes stand for, `[rows, 64]` uint32, from `levels[2**bits]` float32 of keys and of values.

    They are a byte, or two codes of 3 bits (`ROWS`). A row is 256 bytes: what keys' codes decode to, again and again in
    128 bytes, so that every lane of a warp reads a bank of its own, then values'. At 3 and 4 bits that are two float16,
    lowest field first, at 2 bits four.
    """
    bits = (keys.shape[-1] - 1).bit_length()
    row = jnp.arange(ROWS[bits], dtype=jnp.uint32)
    halves = []
    for levels in (keys, values):
        table = lax.bitcast_convert_type(levels.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)
        low, high = (
            jnp.stack(
                [table[(row >> shift) & (2**bits - 1)] for shift in range(first, bits * TOGETHER[bits], 2 * bits)], -1
            )
            for first in (0, bits)
        )
        halves.append(jnp.tile(low | (high << 16), (1, 64 // TOGETHER[bits])))
    return jnp.concatenate(halves, -1)


def lookup_shared(words: jax.Array, table, which: int, bits: int, part: int, layout, interpret) -> list[jax.Array]:
    """As `lookup`, of the fields of one part of each word, by loads from `shared_tables` in shared memory.

    A load takes one instruction for two codes of 3 or 4 bits or four of 2, where byte permutes take four or eight: a
    load of an SM per clock is half of what memory can keep busy at 4 bits, and about all of it at 2.

    Args:
      part: number of the byte, or of the pair of codes.
      which: 0 keys', 1 values'.
    """
    fields = TOGETHER[bits]
    if interpret:
        rows = table[...][((words >> (fields * bits * part)) & (ROWS[bits] - 1)).astype(jnp.int32)]
        halves = [(rows[..., 32 * which + i // 2] >> (16 * (i % 2))).astype(jnp.uint16) for i in range(fields)]
        return [lax.bitcast_convert_type(x, jnp.float16) for x in halves]
    out = plgpu.ShapeDtypeStruct(words.shape, jnp.float16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=(out,) * fields)
    def decode(_, words, table):
        registers = [np.empty(words.registers.shape, dtype=object) for _ in range(fields)]
        base, count = mgpu.utils.memref_ptr(table), fields // 2
        pair, i32 = ir.VectorType.get((2,), ir.F16Type.get()), ir.IntegerType.get_signless(32)
        lane = Word(mgpu.utils.thread_idx()) & (32 // count - 1)
        own = lane * (4 * count) + 128 * which

        def load(address):
            pointer = mgpu.utils.getelementptr(base, [address.value], ir.IntegerType.get_signless(8))
            x = llvm.load(ir.VectorType.get((count,), i32), pointer, alignment=4 * count)
            return [Word(_element(x, j)) for j in range(count)]

        for i in np.ndindex(words.registers.shape):
            w0, w1 = (Word(_element(words.registers[i], j)) for j in (0, 1))
            for out, x in zip(registers, decode_part(w0, w1, own, bits, part, load, prmt, _masked_or)):
                out[i] = llvm.bitcast(pair, x.value)
        return tuple(mgpu.FragmentedArray(_registers=r, _layout=words.layout, _is_signed=None) for r in registers)

    return list(decode(words, table))


def decode_part(w0, w1, own, bits: int, part: int, load, prmt, masked_or) -> list:
    """Pairs of float16 (`w0`'s level low, `w1`'s high) of the fields of a part.

    `load` reads what is at an address of `shared_tables`, in bytes: row * 256 + `own`, which is below 256.
    """

    def address(w):
        if bits != 3:
            return prmt(w, own, 0x5504 + 16 * part)
        shift = 6 * part - 8
        return masked_or(w >> shift if shift > 0 else w << -shift, 0x3F00, own)

    found = (load(address(w)) for w in (w0, w1))
    return [prmt(a, b, select) for a, b in zip(*found) for select in (0x5410, 0x7632)]


def decode_pair(w0, w1, table: list, bits: int, prmt) -> list:
    """Pairs of float16 (`w0`'s level low, `w1`'s high) of all fields."""
    half = len(table) // 2
    low, high = table[:half], table[half:]
    found = {}
    for first, step, nibbles in _nibbles(w0, w1, bits):
        # A byte of `nibbles`: the code of w0 below that of w1; byte j is of field `first + step * j`.
        codes = nibbles & U32(0x77777777)
        top = ((nibbles >> 1) & U32(0x44444444)) | U32(0x32103210) if bits == 4 else None
        for j in (0, 2):
            select = codes >> (8 * j)
            chosen = []
            for part in (low, high):
                picks = [prmt(part[i], part[min(i + 1, half - 1)], select) for i in range(0, half, 2)]
                chosen.append(picks[0] if bits < 4 else prmt(*picks, top >> (8 * j)))
            found[first + step * j] = prmt(*chosen, 0x5140)
            found[first + step * (j + 1)] = prmt(*chosen, 0x7362)
    return [found[f] for f in range(len(found))]


def _nibbles(w0, w1, bits: int) -> list:
    """(first field, step between bytes, word of nibbles); bits above a code within its nibble are cleared where they
    would not be by 0x77777777."""
    if bits == 3:
        w0, w1 = (_spread(w) for w in (w0, w1))
        even = (w0 & U32(0x07070707)) | ((w1 << 4) & U32(0x70707070))
        odd = ((w0 >> 3) & U32(0x07070707)) | ((w1 << 1) & U32(0x70707070))
        return [(0, 2, even), (1, 2, odd)]
    even = (w0 & U32(0x0F0F0F0F)) | ((w1 << 4) & U32(0xF0F0F0F0))
    odd = ((w0 >> 4) & U32(0x0F0F0F0F)) | (w1 & U32(0xF0F0F0F0))
    if bits == 4:
        return [(0, 2, even), (1, 2, odd)]
    return [(f + g, 4, (x >> 2 * g) & U32(0x33333333)) for f, x in ((0, even), (2, odd)) for g in (0, 1)]


def _spread(w):
    """24 bits as four bytes of six; bits above those are left over."""
    w = (w & U32(0x00000FFF)) | ((w << 4) & U32(0xFFFFF000))
    return (w & U32(0x003F003F)) | ((w << 2) & U32(0xFFC0FFC0))


class Word:
    """A 32-bit register of the generated program."""

    def __init__(self, value):
        self.value = value

    def like(self, x) -> "Word":
        return Word(_value(x))

    def __and__(self, other):
        return Word(arith.andi(self.value, _value(other)))

    def __or__(self, other):
        return Word(arith.ori(self.value, _value(other)))

    def __xor__(self, other):
        return Word(arith.xori(self.value, _value(other)))

    def __add__(self, other):
        return Word(arith.addi(self.value, _value(other)))

    def __mul__(self, other):
        return Word(arith.muli(self.value, _value(other)))

    def __floordiv__(self, n: int):
        return self >> (n.bit_length() - 1)  # n: a power of two

    def __mod__(self, n: int):
        return self & (n - 1)

    def __lshift__(self, n):
        return Word(arith.shli(self.value, _value(n)))

    def __rshift__(self, n):
        return self if isinstance(n, int) and n == 0 else Word(arith.shrui(self.value, _value(n)))


def _value(x):
    if isinstance(x, Word):
        return x.value
    i32, x = ir.IntegerType.get_signless(32), int(x)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x - (x >> 31 << 32)))


def _element(x, j: int):
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([j]))


def _masked_or(a: Word, mask: int, b: Word) -> Word:
    """`(a & mask) | b`, which the compiler would rather make a sum that takes an instruction more."""
    operands = [a.value, b.value]
    i32 = ir.IntegerType.get_signless(32)
    text = f"lop3.b32 $0, $1, {mask}, $2, 0xEA;"
    return Word(llvm.inline_asm(i32, operands, text, "=r,r,r", has_side_effects=False))


def prmt(a: Word, b: Word, select) -> Word:
    operands = [a.value, b.value, _value(select)]
    i32 = ir.IntegerType.get_signless(32)
    return Word(llvm.inline_asm(i32, operands, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", has_side_effects=False))
