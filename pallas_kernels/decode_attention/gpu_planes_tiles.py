"""Float16 in bit planes on Hopper: blocks in shared memory, read to a level, as tiles in registers.

In a block of 128 tokens, word c of a channel's first plane holds the high bytes of tokens c, 32 + c, 64 + c, 96 + c,
and word c % 16 of the two other planes a nibble of each of them, in the low or in the high half of its four bytes as c
is below 16 or not. So two operations make a word of low bytes of two words of nibbles, and byte permutes make four
float16 of it and a word of high bytes, exactly as they were stored. Where planes are not read, their bits are 1000....

Tokens come in an order that takes no more permutes than that:

    row 16 w + 8 i + a of tile p     is  token 32 (2p + i) + 8 w + a,     w, a, i, p < 4, 8, 2, 2

so that a thread has all four tokens of a word of keys in its rows; values are summed over in the order of
`rows_by_position`, so that both tokens of a pair of float16 are of one word.

Queries and weights are float16 in two columns side by side, as rounded and what rounding lost: columns are free in
decode, and the products are then as good as float32's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import packing
from pallas_kernels.decode_attention.gpu_codebook_lookup import Word, prmt
from pallas_kernels.decode_attention.gpu_tiles import COLUMN, ROWS, WGMMA, swizzled
from pallas_kernels.decode_attention.gpu_words import fragment, value_rows

f16, f32, u16 = jnp.float16, jnp.float32, jnp.uint16

TOKENS = 128  # of a block
TILES = range(TOKENS // ROWS)
WIDTHS = (8, 4, 4)
LINES = swizzled(8, 32)  # of words: 8 lines of 32
LOST = 2.0**11  # what rounding to float16 lost is kept times this


def token(row: Any, tile: int) -> Any:
    """The token of the block that a row of a tile is; `row` is anything that knows `+ * & >>`."""
    return (((row >> 3) & 1) + 2 * tile) * 32 + (row >> 4) * 8 + (row & 7)


def rows_by_position() -> jax.Array:
    """The row that stands at each position."""
    at = jnp.arange(ROWS, dtype=jnp.int32)
    return (at & 48) + ((at & 1) << 3) + (at & 6) + ((at >> 3) & 1)


def shapes(channels: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Words of a block's planes, keys and values, in lines of whole 128 bytes."""
    keys = [(channels * TOKENS * bits // 1024, 32) for bits in WIDTHS]
    return keys, [(packing.packed_words(TOKENS, bits), channels) for bits in WIDTHS]


def keys(refs: tuple, part: range, interpret: Any) -> list[jax.Array]:
    """Both tiles `[64, channels of part]` of keys of which as many planes are read as there are `refs`."""
    if interpret:
        bits = _bits([ref[...].reshape(-1, TOKENS * width // 32).T for ref, width in zip(refs, WIDTHS)])
        rows = jnp.arange(ROWS, dtype=jnp.int32)
        return [_float(bits[token(rows, p)][:, part.start : part.stop]) for p in TILES]
    return _read(refs, (ROWS, len(part)), functools.partial(key_registers, part=part))


def values(refs: tuple, tile: int, interpret: Any) -> list[jax.Array]:
    """The transpose of both tiles, `[64 channels, 64 tokens]`, of the values' channels of a tile, in the order
    `gpu_words.value_rows`; tokens stand in the order `rows_by_position`."""
    channels = refs[0].shape[-1]
    if interpret:
        bits = _bits([ref[...] for ref in refs])
        here = value_rows(jnp.pad(bits, ((0, 0), (0, -channels % ROWS))).T[tile * ROWS : (tile + 1) * ROWS])
        return [_float(here[:, token(rows_by_position(), p)]) for p in TILES]
    return _read(refs, (ROWS, ROWS), functools.partial(value_registers, lines=channels // 32, tile=tile))


def key_registers(planes: list[Callable], prmt: Callable, thread: tuple, part: range) -> list[list]:
    """A thread's registers of both tiles of `keys`, in their order, two channels each.

    Args:
      planes: of each plane that is read, `at(word) -> load(lines, count)`: `count` words in shared memory from `lines`
        lines of 32 behind a word on.
      prmt: `prmt(a, b, select)`, a byte permute.
      thread: warp, row of eight and number in it, of anything that knows `+ * & | ^ << >>`.
    """
    warp, eighth, j = thread
    chunk = (warp << 1) + (eighth >> 2)  # of four words, of the eight in a line of a first plane
    loads: list[list] = []
    for i, at in enumerate(planes):
        loads.append([])
        for x in (0, 1):
            # The copy engine swizzles: a chunk lies where its number and its line's differ. Of the other planes two
            # channels share a line, and x tells whether the upper bits of the chunk's number and the line's differ.
            line, here = ((j << 1) | x, chunk) if i == 0 else (j, (chunk & 3) ^ (4 * x))
            loads[-1].append(at(line * 32 + ((here ^ line) << 2) + (eighth & 3)))
    first, *rest = loads
    upper = warp >> 1  # whether the tokens' nibbles are in the upper halves
    out: list[list] = [[] for _ in TILES]
    for eight in range(part.start // 8, part.stop // 8):
        halves = []
        for odd in range(2):
            (high,) = first[odd](8 * eight, 1)
            nibbles = [load[odd ^ eight % 2](4 * eight, 1)[0] for load in rest]
            low = _low_bytes(high, nibbles, (upper ^ 1) << 2, upper << 2)
            halves.append([prmt(low, high, select) for select in (0x5140, 0x7362)])
        for tile, (a, b) in zip(out, zip(*halves)):
            tile += [prmt(a, b, select) for select in (0x5410, 0x7632)]
    return out


def value_registers(planes: list[Callable], prmt: Callable, thread: tuple, lines: int, tile: int) -> list[list]:
    """As `key_registers`, of both tiles of `values`, two tokens each.

    Args:
      lines: of 32 channels, of a word row.
    """
    warp, eighth, j = thread
    line = warp >> 1 if 2 * tile + 1 < lines else warp & 0  # what lies beyond 96 channels is cut off
    loads: list[list] = []
    for at in planes:
        loads.append([])
        for x in (0, 1):
            row = (j << 1) | x
            chunk = (((warp & 1) << 2) + (eighth >> 1)) ^ row
            loads[-1].append(at(line * 256 + row * 32 + (chunk << 2) + ((eighth & 1) << 1)))
    first, *rest = loads
    out: list[list] = [[] for _ in TILES]
    for step in range(4):
        for x in range(2):
            high = first[x]((2 * tile + step * lines) * 8, 2)
            nibbles = [load[x]((2 * tile + step % 2 * lines) * 8, 2) for load in rest]
            for row in range(2):  # two channels
                low = _low_bytes(high[row], [n[row] for n in nibbles], 4 * (1 - step // 2), 4 * (step // 2))
                for of, select in zip(out, (0x5140, 0x7362)):
                    of.append(prmt(low, high[row], select))
    return out


def _low_bytes(high: Any, nibbles: list, up: Any, down: Any) -> Any:
    """Low bytes of the four tokens of `high`, of words whose nibbles are shifted up or down to their place."""
    if not nibbles:
        return (high & 0) | 0x80808080
    upper = (nibbles[0] << up) & 0xF0F0F0F0
    return upper | (0x08080808 if len(nibbles) == 1 else (nibbles[1] >> down) & 0x0F0F0F0F)


def _read(refs: tuple, shape: tuple[int, int], registers: Callable) -> list[jax.Array]:
    """Tiles of float16 of the registers of each thread."""
    out = plgpu.ShapeDtypeStruct(shape, f16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(LINES),) * len(refs), return_type=[out] * len(TILES))
    def read(_, *refs):
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        tiles = registers([functools.partial(_at, ref) for ref in refs], prmt, _thread())
        return [fragment([mgpu.utils.bitcast(w.value, pair) for w in x], shape, WGMMA, None) for x in tiles]

    return read(*refs)


def _thread() -> tuple[Word, Word, Word]:
    """Of a thread: the warp, the row of eight and the number in it."""
    thread = Word(mgpu.utils.thread_idx()) & 127
    return thread >> 5, (thread >> 2) & 7, thread & 3


def _at(ref: Any, start: Word) -> Callable:
    """Loads from word `start` on; lines are added as immediates."""
    i32 = ir.IntegerType.get_signless(32)
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [start.value], i32)

    def load(lines: int, count: int) -> list[Word]:
        pointer = mgpu.utils.getelementptr(base, [lines * 32], i32)
        x = llvm.load(ir.VectorType.get((count,), i32), pointer, alignment=4 * count)
        return [Word(vector.extract(x, [], [i])) for i in range(count)]

    return load


def _bits(words: list[jax.Array]) -> jax.Array:
    """Bit patterns `[T, H]` of planes packed along tokens, `[T * b / 32, H]` each."""
    first, *rest = (
        jnp.concatenate([x >> jnp.uint32(shift) for shift in range(0, 32, bits)]).astype(u16) & u16(2**bits - 1)
        for x, bits in zip(words, WIDTHS)
    )
    if not rest:
        return first << u16(8) | u16(0x80)
    return first << u16(8) | rest[0] << u16(4) | (rest[1] if len(rest) > 1 else u16(8))


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, f16)


# Columns in pairs.


def paired(x: jax.Array, columns: int, fill: float) -> jax.Array:
    """`x[..., G]` as `[..., columns]`, each twice, and `fill` in columns of no query."""
    x = jnp.repeat(x, 2, axis=-1)
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, columns - x.shape[-1]),), constant_values=fill)


def joined_columns(x: jax.Array, interpret: Any) -> jax.Array:
    """Scores `[64, columns]`: of each pair of columns what both say, in both."""
    if interpret:
        high, lost = x[:, ::2], x[:, 1::2]
        return jnp.repeat(high + lost * f32(1 / LOST), 2, axis=1)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(x.shape, f32, layout=WGMMA))
    def join(_, x):
        weight = mgpu.utils.c(1 / LOST, ir.F32Type.get())
        out = []
        for register in x.registers.flat:
            high, lost = (vector.extract(register, [], [i]) for i in range(2))
            both = arith.addf(high, arith.mulf(lost, weight))
            out.append(vector.from_elements(register.type, [both, both]))
        return fragment(out, x.shape, WGMMA, None)

    return join(x)


def store_weights(ref: Any, tiles: list[jax.Array], interpret: Any) -> None:
    """Stores weights `[64, columns]` of both tiles as `ref[tile, columns, 64]`, the right operand of values: rounded in
    even columns, what rounding lost in odd ones. Other threads see them after `plgpu.commit_smem()`."""
    if interpret:
        for p, x in enumerate(tiles):
            high = x.astype(f16)
            odd = (jnp.arange(x.shape[1]) % 2 == 1).reshape(1, -1)
            ref[p] = jnp.where(odd, (x - high.astype(f32)).astype(f16), high)[rows_by_position()].T
        return
    columns = tiles[0].shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(8, 16)), *[WGMMA] * len(tiles)))
    def store(_, ref, *tiles):
        thread, i32 = _thread(), ir.IntegerType.get_signless(32)
        pair, wide = (ir.VectorType.get((2,), kind.get()) for kind in (ir.F16Type, ir.F32Type))
        for odd in range(2):
            base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [weight_word(thread, odd).value], i32)
            for p, x in enumerate(tiles):
                rows = iter(x.registers.flat)
                for eight, both in enumerate(zip(rows, rows)):  # rows that are 8 apart
                    weights = vector.from_elements(wide, [vector.extract(r, [], [0]) for r in both])
                    half = arith.truncf(pair, weights)
                    if odd:
                        half = arith.truncf(pair, arith.subf(weights, arith.extf(wide, half)))
                    at = mgpu.utils.getelementptr(base, [(p * columns + eight * 8) * 32], i32)
                    llvm.store(half, at, alignment=4)

    store(ref, *tiles)


def weight_word(thread: tuple, odd: int) -> Any:
    """Where in `[8, 64]` of float16, in words, a thread stores its two rows' weights of column 2 j + `odd`."""
    warp, eighth, j = thread
    line = (j << 1) | odd
    chunk = ((warp << 1) | (eighth & 1)) ^ line
    return line * 32 + (chunk << 2) + (eighth >> 1)


def largest(column: jax.Array, interpret: Any) -> jax.Array:
    """The scalar maximum of `[columns]`."""
    if interpret:
        return column.max()
    scalar = plgpu.ShapeDtypeStruct((), f32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(COLUMN,), return_type=scalar)
    def reduce(_, x):
        found = None
        for register in x.registers.flat:
            for i in range(ir.VectorType(register.type).shape[0]):
                one = vector.extract(register, [], [i])
                found = one if found is None else arith.maximumf(found, one)
        for distance in (1, 2):  # threads with other columns
            found = arith.maximumf(found, mgpu.utils.shfl_bfly(found, distance))
        return mgpu.FragmentedArray.splat(found, (), is_signed=None)

    return reduce(column)
