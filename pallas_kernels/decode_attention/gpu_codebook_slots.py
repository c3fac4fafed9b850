"""Outlier slots on Hopper: a residual per slot, at a channel that differs from token to token.

Adding residuals to decoded registers would cost every element of a plane two instructions or more per slot. Instead a
thread takes whole tokens. Keys: it adds residual times rotated query to the token's scores, which the products then
start from; queries lie with their columns together, so that both channels of a pair are read at once. Values: it writes
the residuals of a plane into an empty tile of shared memory, the A operand of one more product against the weights
without their scale. Two tiles take turns, one for each half of the threads, which clear them again; of large heads one.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.decode_attention.gpu_codebook_lookup import Word
from pallas_kernels.decode_attention.gpu_codebook_tiles import DEPTH, regrouped
from pallas_kernels.decode_attention.gpu_skeleton import Plan
from pallas_kernels.decode_attention.gpu_tiles import ROWS

STEPS = ROWS // DEPTH


def key_scores(plan: Plan, target, slots, angles, turns, queries, planes: range) -> None:
    """Stores what the slots add to the scores of `planes`: `target[planes, 64, columns]` float32.

    Args:
      slots: refs of channel uint8 and of residual uint16 (float16 bits), `[blocks, s, T]`.
      angles: `[16, 2, H/2]` float32, cos and sin by row of a warp's 16 of a plane.
      turns: `[4, 4, width]` float32, whose last has cos and sin, H/2 each, by which each warp is turned back.
      queries: `[planes, H, columns]` float16.
    """
    if plan.interpret:
        for i, p in enumerate(planes):
            target[i] = _key_scores_array(plan, [s[...] for s in slots], angles[...], turns[...], queries[p], p)
        return
    half = plan.channels // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 6)
    def write(_, target, channel, residual, angles, turns, queries):
        queries = _Bytes(queries, 2)
        target, angles, turns = (_Bytes(x, 4) for x in (target, angles, turns))
        slots = _Slots(plan, channel, residual)
        row, part = slots.row, slots.part
        used = -(-plan.queries // 4) * 4  # columns; the others' queries are 0
        zero = Word(utils.c(0.0, ir.F32Type.get()))
        utils.warpgroup_barrier()  # all have read what was there

        @utils.fori(arith.constant(_i32(), len(planes) // 2), [])
        def _(i, carry):
            plane = part + Word(i) * 2 + planes.start
            sums = [zero] * used
            for s in range(slots.count):
                c, r = slots.channel(plane, s), slots.residual(plane, s)
                pair, upper = _halved(c, half)
                cos1, sin1 = (angles.number(((row & (DEPTH - 1)) * 2 + j) * half + pair) for j in (0, 1))
                own = (row >> 4) * turns.row(4) + turns.row(3) + pair
                cos2, sin2 = (turns.number(own + i) for i in (0, half))
                cos = _fma(cos1, cos2, _mul(sin1, sin2))
                sin = _fma(sin1, cos2, _negative(_mul(cos1, sin2)))
                r = _float(r)
                first = _mul(r, _choose(upper, _negative(sin), cos))
                second = _mul(r, _choose(upper, cos, sin))
                where = (plane * plan.channels + pair) * plan.columns
                for factor, at in ((first, where), (second, where + half * plan.columns)):
                    q = [_float(x >> n) for x in queries.words(at, used // 2) for n in (0, 16)]
                    sums = [_fma(factor, a, b) for a, b in zip(q, sums)]
            target.store(
                ((part + Word(i) * 2) * ROWS + row) * plan.columns,
                sums + [zero] * (plan.columns - used),
                ir.F32Type.get(),
            )
            return carry

        utils.warpgroup_barrier()

    write(target, *slots, angles, turns, queries)


def _key_scores_array(plan: Plan, slots, angles, turns, q, plane: int) -> jax.Array:
    row, half = jnp.arange(ROWS, dtype=jnp.int32), plan.channels // 2
    block, token = plan.block(row), plan.token_in_block(row, plane)
    total = jnp.zeros((ROWS, plan.columns), jnp.float32)
    q = q.astype(jnp.float32)
    for s in range(slots[0].shape[1]):
        c = slots[0][block, s, token].astype(jnp.int32)
        r = lax.bitcast_convert_type(slots[1][block, s, token], jnp.float16).astype(jnp.float32)
        pair = c % half
        cos1, sin1 = (angles[row % DEPTH, j, pair] for j in (0, 1))
        cos2, sin2 = (turns[row // DEPTH, 3, pair + i] for i in (0, half))
        cos, sin = cos1 * cos2 + sin1 * sin2, sin1 * cos2 - cos1 * sin2
        first, second = jnp.where(c < half, cos, -sin), jnp.where(c < half, sin, cos)
        total = total + (r * first)[:, None] * q[pair] + (r * second)[:, None] * q[pair + half]
    return total


def clear(tiles, interpret) -> None:
    """Zeros in `tiles[n, 4, H, 16]` float16."""
    if interpret:
        tiles[...] = jnp.zeros(tiles.shape, jnp.float16)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def write(_, tiles):
        memory, zero = _Bytes(tiles, 2), Word(arith.constant(_i32(), 0))
        thread = Word(utils.thread_idx()) & 127
        for i in range(0, math.prod(ir.MemRefType(tiles.type).shape), 1024):
            memory.store(thread * 8 + i, [zero] * 4)
        utils.warpgroup_barrier()

    write(tiles)


def value_tile(plan: Plan, tiles, slots, planes: range, plane: int) -> None:
    """Writes the residuals of `plane` into `tiles[plane % n]`, 16 tokens by channels `regrouped` four times, and takes
    those of the last plane there out of it; `slots` as above."""
    n, padded = tiles.shape[0], tiles.shape[2]
    if plan.interpret:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        block, token = plan.block(row), plan.token_in_block(row, plane)
        here = regrouped(jnp.arange(padded, dtype=jnp.int32))[:, None]
        total = jnp.zeros((padded, ROWS), jnp.float32)
        for s in range(slots[0].shape[1]):
            c = slots[0][...][block, s, token].astype(jnp.int32)
            r = lax.bitcast_convert_type(slots[1][...][block, s, token], jnp.float16).astype(jnp.float32)
            total = total + jnp.where(here == c[None], r[None], 0.0)
        tiles[plane % n] = total.astype(jnp.float16).reshape(-1, STEPS, DEPTH).swapaxes(0, 1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def write(_, tiles, channel, residual):
        slots = _Slots(plan, channel, residual)
        memory = _Bytes(tiles, 2)
        mine = arith.cmpi(arith.CmpIPredicate.eq, slots.part.value, slots.part.like(plane % n).value)
        if n == 1:
            utils.warpgroup_barrier()  # all have read what is taken out
        with utils.when(mine):

            def place(p, s):
                step = (slots.row >> 4) + plane % n * STEPS
                return (step * padded + _regrouped(slots.channel(p, s), padded)) * DEPTH + (slots.row & 15)

            if plane - n >= planes.start:
                for s in range(slots.count):
                    memory.store_half(place(slots.part.like(plane - n), s), slots.part.like(0))
            for s in range(slots.count):
                p = slots.part.like(plane)
                at, r = place(p, s), slots.residual(p, s)
                # A second slot may name the same channel.
                memory.store_half(at, r if s == 0 else _add2(r, memory.half(at)))
        utils.warpgroup_barrier()

    write(tiles, *slots)


def _halved(c: Word, half: int) -> tuple[Word, Word]:
    """The pair of a channel, and what is not zero for the upper one."""
    if half & (half - 1) == 0:
        return c & (half - 1), c & half
    upper = Word(arith.extui(_i32(), arith.cmpi(arith.CmpIPredicate.uge, c.value, c.like(half).value)))
    return c + upper * (-half), upper


def _regrouped(channel: Word, size: int) -> Word:
    warp, rest = channel // (size // 4), channel % (size // 4)
    group, last = rest // (size // 32), rest % (size // 32)
    return (last >> 1) * 64 + warp * 16 + (last & 1) * 8 + group


class _Slots:
    """The tokens of a thread: one row of 64, of every plane (`part`: which half of the threads)."""

    def __init__(self, plan: Plan, channel, residual):
        thread = Word(utils.thread_idx()) & 127
        self.plan, self.row, self.part = plan, thread & (ROWS - 1), thread >> 6
        _, self.count, _ = ir.MemRefType(channel.type).shape
        self._channel, self._residual = _Bytes(channel, 1), _Bytes(residual, 2)

    def _at(self, plane: Word, s: int) -> Word:
        plan = self.plan
        return (
            plan.block(self.row) * (self.count * plan.tokens) + plan.token_in_block(self.row, plane) + s * plan.tokens
        )

    def channel(self, plane: Word, s: int) -> Word:
        return self._channel.byte(self._at(plane, s))

    def residual(self, plane: Word, s: int) -> Word:
        return self._residual.half(self._at(plane, s))


class _Bytes:
    """Contiguous shared memory, indexed by elements of `size` bytes."""

    def __init__(self, ref, size: int):
        self.base, self.size, self.shape = utils.memref_ptr(ref), size, ir.MemRefType(ref.type).shape

    def row(self, i: int) -> int:
        return i * self.shape[-1]

    def _pointer(self, at: Word):
        return utils.getelementptr(self.base, [(at * self.size).value], ir.IntegerType.get_signless(8))

    def _small(self, at: Word, bits: int) -> Word:
        x = llvm.load(ir.IntegerType.get_signless(bits), self._pointer(at), alignment=bits // 8)
        return Word(arith.extui(_i32(), x))

    def byte(self, at: Word) -> Word:
        return self._small(at, 8)

    def half(self, at: Word) -> Word:
        return self._small(at, 16)

    def number(self, at: Word) -> Word:
        return Word(llvm.load(ir.F32Type.get(), self._pointer(at), alignment=4))

    def words(self, at: Word, count: int) -> list[Word]:
        """`count` words, a multiple of 2, from element `at` on."""
        step, found = 4 if count % 4 == 0 else 2, []
        for i in range(0, count, step):
            kind = ir.VectorType.get((step,), _i32())
            x = llvm.load(kind, self._pointer(at + 4 // self.size * i), alignment=4 * step)
            found += [Word(llvm.extractelement(x, utils.c(j, _i32()))) for j in range(step)]
        return found

    def store(self, at: Word, words: list[Word], kind=None) -> None:
        for i in range(0, len(words), 4):
            x = llvm.mlir_undef(ir.VectorType.get((4,), kind or _i32()))
            for j, w in enumerate(words[i : i + 4]):
                x = llvm.insertelement(x, w.value, position=utils.c(j, _i32()))
            llvm.store(x, self._pointer(at + 4 // self.size * i), alignment=16)

    def store_half(self, at: Word, x: Word) -> None:
        llvm.store(arith.trunci(ir.IntegerType.get_signless(16), x.value), self._pointer(at), alignment=2)


def _i32():
    return ir.IntegerType.get_signless(32)


def _ptx(text: str, result: str, *operands: tuple[str, Word]) -> Word:
    constraints = ",".join([f"={result}", *(kind for kind, _ in operands)])
    kind = ir.F32Type.get() if result == "f" else _i32()
    return Word(llvm.inline_asm(kind, [x.value for _, x in operands], text, constraints, has_side_effects=False))


def _float(half: Word) -> Word:
    """float32 of float16 bits."""
    return Word(
        arith.extf(
            ir.F32Type.get(), arith.bitcast(ir.F16Type.get(), arith.trunci(ir.IntegerType.get_signless(16), half.value))
        )
    )


def _mul(a: Word, b: Word) -> Word:
    return _ptx("mul.f32 $0, $1, $2;", "f", ("f", a), ("f", b))


def _fma(a: Word, b: Word, c: Word) -> Word:
    return _ptx("fma.rn.f32 $0, $1, $2, $3;", "f", ("f", a), ("f", b), ("f", c))


def _negative(a: Word) -> Word:
    return Word(arith.negf(a.value))


def _choose(where: Word, a: Word, b: Word) -> Word:
    zero = arith.constant(_i32(), 0)
    return Word(arith.select(arith.cmpi(arith.CmpIPredicate.ne, where.value, zero), a.value, b.value))


def _add2(a: Word, b: Word) -> Word:
    return _ptx("add.f16x2 $0, $1, $2;", "r", ("r", a), ("r", b))
