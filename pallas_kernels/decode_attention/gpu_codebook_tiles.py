"""Registers of a warpgroup for codebook storage on Hopper: operands of warp-level `mma`, and packed words as such.

`mma` takes both operands from registers and leaves no accumulator in flight, so that a plane goes from words to product
16 columns of depth at a time and no register is tied up; it costs as many instructions as `wgmma` does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.decode_attention.gpu_codebook_lookup import Word
from pallas_kernels.decode_attention.gpu_skeleton import At, Plan
from pallas_kernels.decode_attention.gpu_tiles import ROW, ROWS

DEPTH = 16  # columns of A in one mma
LEFT = plgpu.Layout.MMA_LHS(jnp.float16, m_warps=4)
RIGHT = plgpu.Layout.MMA_RHS(jnp.float16, m_warps=4)


def fetch_blocks(plan: Plan, sources, targets, at: At, barrier) -> None:
    """Copies a chunk's blocks of `flat` arrays `[blocks, K or 1, ...]` to `targets[blocks, ...]`."""
    for source, target in zip(sources, targets):
        head = at.head if source.shape[1] > 1 else 0
        plgpu.copy_gmem_to_smem(source.at[at.blocks(plan), head], target, barrier)


def load(ref, layout, interpret) -> jax.Array:
    return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)


def added(x: jax.Array, a: jax.Array, b: jax.Array, interpret, sign: int = 1) -> jax.Array:
    """`x + sign * a * b` in float16 with one rounding: one instruction of the GPU, which joins a product and a sum."""
    if interpret:
        x, a, b = (v.astype(jnp.float32) for v in (x, a, b))
        return (x + sign * a * b).astype(jnp.float16)
    return x + a * b if sign > 0 else x - a * b


def product(acc: jax.Array, a: jax.Array, b: jax.Array, interpret) -> jax.Array:
    """`acc + a @ b`, float32."""
    if not interpret:
        return plgpu.mma(acc, a, b)
    return acc + jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def key_words(ref, column, bits: int, interpret) -> jax.Array:
    """Words `ref[blocks, word rows, H]` of a chunk from `column` on as a tile `[64, 16]` for `lookup`.

    At 3 bits a block is three words of each of its cells, and rows 16 w to 16 w + 15 of the tile get codes 8 w to
    8 w + 7 of the cells of all blocks: bits 24 w and up. Otherwise, where a chunk has 32 words of a channel, rows 32
    and up get their upper halves.
    """
    cells = ref.shape[1] // (3 if bits == 3 else 1)
    halved = bits != 3 and ref.shape[0] * cells < ROWS
    if interpret:
        words = ref[:, :, pl.ds(column, DEPTH)]
        if bits != 3:
            words = words.reshape(-1, DEPTH)
            return jnp.concatenate([words, words >> 16]) if halved else words
        return jnp.concatenate([_eight_codes(words, w) for w in range(4)])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=_tile(64))
    def read(_, ref, column):
        warp, group, lane = _thread()
        words, column = _Words(ref), Word(column.registers.item()) + lane * 2
        registers = _registers(64)
        for part, half in np.ndindex(2, 2):
            row, here = group + 8 * half, column + 8 * part
            if bits == 3:
                pair = _codes_of(words, _cell(row, cells), here, 2, warp, cells)
            elif halved:
                pair = [w >> (warp >> 1) * 16 for w in words.at(row + (warp & 1) * DEPTH, here, 2)]
            else:
                pair = words.at(row + warp * DEPTH, here, 2)
            registers[0, 0, 0, part, half, 0, 0, 0, 0] = _vector(pair)
        return _fragment(registers)

    return read(ref, jnp.int32(column))


def value_words(ref, step, bits: int, size: int, interpret) -> jax.Array:
    """Words `ref[blocks, word rows, H]` of a chunk, transposed: the tile `[size, 16]` of rows 16 step to 16 step + 15.

    Channels are `regrouped`, so that a thread reads neighbouring channels at once; those from H to `size` are whatever
    follows in shared memory. Rows are those of `key_words`.
    """
    cells = ref.shape[1] // (3 if bits == 3 else 1)
    halved = bits != 3 and ref.shape[0] * cells < ROWS
    if interpret:
        if bits == 3:
            words = jnp.stack([_eight_codes(ref[...], w) for w in range(4)])[step]
        elif halved:
            words = ref[...].reshape(-1, DEPTH, ref.shape[-1])[step % 2] >> (16 * (step // 2)).astype(jnp.uint32)
        else:
            words = ref[...].reshape(-1, DEPTH, ref.shape[-1])[step]
        return regrouped(jnp.pad(words, ((0, 0), (0, size - words.shape[-1])))).T

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=_tile(size))
    def read(_, ref, step):
        warp, group, lane = _thread()
        words, step = _Words(ref), Word(step.registers.item())
        first = warp * (size // 4) + group * (size // 32)
        registers = _registers(size)
        for part in (0, 1):
            pair = []
            for k in (0, 1):
                row = lane * 2 + (8 * part + k)
                if bits == 3:
                    pair.append(_codes_of(words, _cell(row, cells), first, size // 32, step, cells))
                elif halved:
                    found = words.at(row + (step & 1) * DEPTH, first, size // 32)
                    pair.append([w >> (step >> 1) * 16 for w in found])
                else:
                    pair.append(words.at(row + step * DEPTH, first, size // 32))
            for j, w in enumerate(zip(*pair)):
                registers[j // 2, 0, 0, part, j % 2, 0, 0, 0, 0] = _vector(w)
        return _fragment(registers)

    return read(ref, jnp.int32(step))


def repeated(ref, width: int, layout, interpret) -> jax.Array:
    """float32 `ref[C]` again and again, to `[width]`."""
    if interpret:
        return jnp.resize(ref[...], (width,))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((width,), jnp.float32, layout=layout)
    )
    def read(_, ref):
        fragment, (size,) = layout.to_mgpu(), ir.MemRefType(ref.type).shape
        registers = np.empty(fragment.registers_shape((width,)), dtype=object)
        count, index = fragment.vec_size, ir.IndexType.get()
        kind = ir.VectorType.get((count,), ir.F32Type.get())
        for i, (at,) in enumerate(fragment.thread_idxs((width,))):
            where = arith.remui(at, arith.constant(index, size))
            registers.flat[i] = vector.load(kind, ref, [where])
        return mgpu.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None)

    return read(ref)


def row_tables(ref, column, interpret) -> list[jax.Array]:
    """float32 `ref[16, n, C]` from `column` on as n tiles `[64, 16]`, the same for each warp's 16 rows."""
    n = ref.shape[1]
    if interpret:
        return [jnp.tile(ref[:, i, pl.ds(column, DEPTH)], (ROWS // DEPTH, 1)) for i in range(n)]
    return _float_tiles(ref, column, n, lambda i, warp, row: row * n + i, shared=False)


def warp_rows(ref, count: int, column, interpret) -> list[jax.Array]:
    """float32 `ref[4, n, C]` from `column` on: the first `count` rows of each warp as tiles `[64, 16]`."""
    if interpret:
        return [jnp.repeat(ref[:, i, pl.ds(column, DEPTH)], DEPTH, axis=0) for i in range(count)]
    n = ref.shape[1]
    return _float_tiles(ref, column, count, lambda i, warp, row: warp * n + i, shared=True)


def _float_tiles(ref, column, count: int, line, shared: bool) -> list[jax.Array]:
    """Tiles of the rows `line(i, warp, row of 16)` of `ref[..., C]`; `shared`: whether they are all rows' of a warp."""
    out = plgpu.ShapeDtypeStruct((ROWS, DEPTH), jnp.float32, layout=LEFT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=(out,) * count if count > 1 else out
    )
    def read(_, ref, column):
        warp, group, lane = _thread()
        f32 = ir.F32Type.get()
        base, width = utils.memref_ptr(ref), ir.MemRefType(ref.type).shape[-1]
        here, found = Word(column.registers.item()) + lane * 2, []
        for i in range(count):
            registers = _registers(ROWS)
            for part, half in np.ndindex(2, 2):
                if half and shared:
                    registers[0, 0, 0, part, half, 0, 0, 0, 0] = registers[0, 0, 0, part, 0, 0, 0, 0, 0]
                    continue
                where = line(i, warp, group + 8 * half) * width + here + 8 * part
                pointer = utils.getelementptr(base, [where.value], f32)
                x = llvm.load(ir.VectorType.get((2,), f32), pointer, alignment=8)
                registers[0, 0, 0, part, half, 0, 0, 0, 0] = x
            found.append(mgpu.FragmentedArray(_registers=registers, _layout=LEFT.to_mgpu(), _is_signed=None))
        return tuple(found) if count > 1 else found[0]

    found = read(ref, jnp.int32(column))
    return list(found) if count > 1 else [found]


def row_numbers(plan: Plan, ref, planes: range) -> list[jax.Array]:
    """float16 bit patterns `ref[blocks, T]` of the rows of each plane: `[64]` float32."""
    if plan.interpret:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        bits = [ref[...][plan.block(row), plan.token_in_block(row, p)] for p in planes]
        return [jax.lax.bitcast_convert_type(x, jnp.float16).astype(jnp.float32) for x in bits]
    out = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out,) * len(planes))
    def read(_, ref):
        warp, group, _ = _thread()
        base, f16, f32 = utils.memref_ptr(ref), ir.F16Type.get(), ir.F32Type.get()
        found = []
        for p in planes:
            registers = np.empty(2, dtype=object)
            for half in (0, 1):
                row = warp * DEPTH + group + 8 * half
                at = plan.block(row) * plan.tokens + plan.token_in_block(row, p)
                x = llvm.load(f16, utils.getelementptr(base, [at.value], f16), alignment=2)
                registers[half] = vector.broadcast(ir.VectorType.get((1,), f32), arith.extf(f32, x))
            fragment = ROW.to_mgpu()
            registers = registers.reshape(fragment.registers_shape((ROWS,)))
            found.append(mgpu.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None))
        return tuple(found)

    return list(read(ref))


def regrouped(x: jax.Array) -> jax.Array:
    """`[..., H]` in the order of the rows of `value_words`: row 64 i + 16 w + 8 h + g is channel
    (H / 4) w + (H / 32) g + 2 i + h."""
    x = x.reshape(*x.shape[:-1], 4, 8, -1, 2)
    lead = range(x.ndim - 4)
    return x.transpose(*lead, *(len(lead) + a for a in (2, 0, 3, 1))).reshape(*x.shape[:-4], -1)


def channel_of_row(row, size: int):
    """The channel of `size` in a row of `value_words`; `row` is anything that knows `+ * // %`."""
    return row % 64 // 16 * (size // 4) + row % 8 * (size // 32) + row // 64 * 2 + row // 8 % 2


def _eight_codes(words: jax.Array, w: int) -> jax.Array:
    """Codes 8 w to 8 w + 7 of 3-bit cells, `words[blocks, 3 * cells, C]`, in the low 24 bits: `[blocks * cells, C]`."""
    words = words.reshape(words.shape[0], 3, -1, words.shape[-1])
    low, shift = 24 * w // 32, 24 * w % 32
    x = words[:, low] >> shift
    x = x | (words[:, low + 1] << (32 - shift)) if w in (1, 2) else x
    return x.reshape(-1, x.shape[-1])


def _tile(rows: int):
    return plgpu.ShapeDtypeStruct((rows, DEPTH), jnp.uint32, layout=LEFT)


def _registers(rows: int) -> np.ndarray:
    return np.empty(LEFT.to_mgpu().registers_shape((rows, DEPTH)), dtype=object)


def _fragment(registers: np.ndarray):
    return mgpu.FragmentedArray(_registers=registers, _layout=LEFT.to_mgpu(), _is_signed=False)


def _thread() -> tuple[Word, Word, Word]:
    """Warp of the warpgroup, and the row of 8 and the pair of 8 columns that a thread holds."""
    thread = Word(utils.thread_idx())
    return (thread >> 5) & 3, (thread >> 2) & 7, thread & 3


def _cell(r: Word, cells: int) -> Word:
    """The first word row of cell `r` of a chunk at 3 bits."""
    return (r >> (cells.bit_length() - 1)) * (3 * cells) + (r & (cells - 1))


def _codes_of(words: "_Words", row: Word, column: Word, count: int, w: Word, cells: int) -> list[Word]:
    """Codes 8 w to 8 w + 7, in the low 24 bits, of the cell whose first word is in `row`."""
    low = (w * 3) >> 2  # 0, 0, 1, 2
    high = low + ((w & 1) ^ (w >> 1))  # 0, 1, 2, 2
    pairs = zip(*(words.at(row + i * cells, column, count) for i in (low, high)))
    return [_funnel(*p, (w * 24) & 31) for p in pairs]


def _funnel(low: Word, high: Word, shift) -> Word:
    """32 bits from bit `shift` of the 64."""
    operands = [low.value, high.value, (low.like(shift)).value]
    i32 = operands[0].type
    return Word(llvm.inline_asm(i32, operands, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", has_side_effects=False))


def _vector(words):
    i32 = ir.IntegerType.get_signless(32)
    x = llvm.mlir_undef(ir.VectorType.get((2,), i32))
    for j, w in enumerate(words):
        x = llvm.insertelement(x, w.value, position=utils.c(j, i32))
    return x


class _Words:
    """Shared memory `[..., columns]` of 32-bit words, as rows."""

    def __init__(self, ref):
        self.base = utils.memref_ptr(ref)
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        assert strides[-1] == 1
        self.stride = strides[-2]

    def at(self, row: Word, column: Word, count: int) -> list[Word]:
        """Words `[row, column : column + count]`; `column` is a multiple of `count`."""
        i32 = ir.IntegerType.get_signless(32)
        step, found = min(count, 4), []
        for i in range(0, count, step):
            where = row * self.stride + column + i
            pointer = utils.getelementptr(self.base, [where.value], i32)
            x = llvm.load(ir.VectorType.get((step,), i32), pointer, alignment=4 * step)
            places = (ir.DenseI64ArrayAttr.get([j]) for j in range(step))
            found += [Word(vector.extract(x, dynamic_position=[], static_position=p)) for p in places]
        return found
