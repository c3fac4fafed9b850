"""Decode attention on Hopper: the walk over the context, shared by all storage formats (Pallas Mosaic GPU).

A program takes one row, one kv head and one split of its blocks, and walks them in *chunks* of `run` blocks. Blocks are
packed along tokens (`pallas_kernels.packing`): word row c of a block holds tokens f * C + c. A chunk of keys lies in
shared memory as tiles of 64 rows: R word rows of each of `run = 64 / R` blocks, so that one field of a tile is a
*plane*, 64 tokens x H, which is the A operand of a `wgmma` against the queries:

    row r of plane p  is  token  p * R + r % R  of block  r // R  of the chunk,     0 <= p < T / R.

Where a chunk of 64 / R blocks were too much (few bits), the 64 rows are several groups, each of another part of the
same blocks (`Plan.token`), and a plane takes another field of each.

Keys and values may have different word rows; R divides both, so both see the same planes. Scores and weights are tiles
`[64, columns]` of float32, queries in columns (8 or 16 of them). Splits are merged outside.

A decoder is a frozen dataclass with static fields only (`plan` among them). It supplies

    word_rows(fmt)                      rows that a block has: T for dense, words of a block for packed codes (static)
    arrays(...) -> list                 what the kernel reads: for keys of (fmt, q [B, K, columns, H] float32), for
                                        values of (fmt,); rotation tables and slot arrays go here too
    scratch() -> list                   shared memory; a chunk's own with a leading axis of one slot per chunk in flight
    copies() -> int                     asynchronous copies that `fetch` starts for one chunk
    fetch(src, dst, at, slot, barrier)  starts them; `src`, `dst`: refs of arrays and scratch, `at`: where (`At`)
    keys:   begin(src, dst, at, barrier)       once per program: copies that many barrier arrivals, waits for them
            begin_copies() -> int              how many
            scores(dst, at, slot, planes) -> [tile per plane]       in units of log2; `planes` are static numbers
    values: init() -> state             accumulators, any pytree
            add(dst, at, slot, planes, weights, alpha [columns], state) -> state
                                        state * alpha + the values of those planes times their weights
            borrows -> int              scratch of the keys, the first of them, that `add` finds behind its own
            store(ref [G, H], state)    writes the program's answer, float32, to device memory
"""
# (It checks against the oldest JAX admitted, which lacks what this file is written for.)

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.formats import Format, Partial, shape_of
from pallas_kernels.decode_attention.gpu_answers import store_column
from pallas_kernels.decode_attention.gpu_tiles import COLUMN, ROWS, full, over_rows
from pallas_kernels.decode_attention.gpu_waves import programs_at_once, splits_in_waves
from pallas_kernels.decode_attention.reference import EMPTY

LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a call: those of the storage, then R, the columns and how many of them queries fill, chunks in
    flight; `groups` as above, and the registers that scores may take at once (`columns / 2` per plane)."""

    layers: int
    batch: int
    heads: int
    blocks: int
    tokens: int
    channels: int
    rows: int
    columns: int
    queries: int
    slots: int
    interpret: Any
    groups: int
    alive: int

    @property
    def length(self) -> int:
        """Of the blocks' axis of `flat` arrays."""
        return max(self.run, self.layers * self.batch * self.blocks)

    @property
    def run(self) -> int:
        return ROWS // (self.rows * self.groups)

    @property
    def planes(self) -> int:
        return self.tokens // (self.rows * self.groups)

    def block(self, row):
        """The block of the chunk that a row of a tile is of; `row` is anything that knows `+ * // %`."""
        return row % (ROWS // self.groups) // self.rows

    def token_in_block(self, row, plane):
        part = row // (ROWS // self.groups) * (self.tokens // self.groups)
        return part + row % self.rows + plane * self.rows

    def token(self, row, plane):
        """The token of the chunk that a row of a plane is."""
        return self.block(row) * self.tokens + self.token_in_block(row, plane)

    @property
    def padded(self) -> int:
        """Channels in whole tiles."""
        return -(-self.channels // ROWS) * ROWS

    @property
    def rounds(self) -> list[range]:
        step = min(self.planes, 2 * self.alive // self.columns)
        return [range(i, i + step) for i in range(0, self.planes, step)]


@dataclasses.dataclass(frozen=True)
class At:
    """Where a program, or one chunk of it, is; all traced.

    Attributes:
      layer, row, head: of the program.
      base: block 0 of the row, where layers, rows and blocks are one axis.
      start: the chunk's first block within the row; negative where fewer than `run` blocks are left in the arrays.
    """

    layer: Any
    row: Any
    head: Any
    base: Any
    start: Any = 0

    def block(self, i):
        return jnp.maximum(self.start + i, 0)

    def blocks(self, plan: Plan):
        """The chunk's blocks, on the axis of `flat` arrays."""
        return pl.ds(self.base + self.start, plan.run)


def flat(plan: Plan, x: jax.Array) -> jax.Array:
    """`[L, B, N, ...]` as `[L * B * N, ...]`, so that one copy fetches all blocks of a chunk."""
    x = x.reshape(-1, *x.shape[3:])
    short = max(0, plan.run - x.shape[0])
    return jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1))) if short else x


def plan(k: Format, group: int, word_rows: tuple[int, ...], interpret: Any, groups: int = 1) -> Plan:
    layers, batch, blocks, heads, tokens, channels = shape_of(k)
    rows = min(ROWS, *word_rows)
    columns, alive = 8 if group <= 8 else 16, 64 if channels <= 128 else 8
    return Plan(layers, batch, heads, blocks, tokens, channels, rows, columns, group, 1, interpret, groups, alive)


def attend(plan: Plan, keys, values, k: Format, v: Format, q, layer, first, last, splits: int | None = None) -> Partial:
    """`q [B, K, G, H]` float32 times the softmax scale, to a Partial; `splits`: if not as many as suit."""
    if splits is None:
        at_once = programs_at_once([*keys.scratch(), *values.scratch()])
        splits = splits_in_waves(plan.batch * plan.heads, at_once, plan.blocks * plan.tokens)
    padding = ((0, 0), (0, 0), (0, plan.columns - plan.queries), (0, 0))
    inputs = [keys.arrays(k, jnp.pad(q, padding)), values.arrays(v)]
    scalars = [x.astype(jnp.int32).reshape(-1) for x in (layer, first, last)]
    return merged(*_call(plan, splits, keys, values, scalars, inputs))


def merged(acc: jax.Array, top: jax.Array, total: jax.Array, lift: int = 0) -> Partial:
    """Joins splits.

    Args:
      acc: `[B, K, S, G, H]`, times 2**lift.
      top: `[B, K, S, G]`, in units of log2.
      total: as `top`, times 2**lift.
    """
    best = functools.reduce(jnp.maximum, [top[:, :, i] for i in range(top.shape[2])])
    weight = jnp.exp2(top - best[:, :, None] - jnp.float32(lift))
    acc, total = (_joined(x, weight) for x in (acc, total))
    return Partial(acc, jnp.where(total > 0, best / jnp.float32(LOG2E), jnp.float32(EMPTY)), total)


def _joined(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The sum of `x[B, K, S, G, ...] * weight[B, K, S, G]` over splits.

    Written out, because XLA makes reductions kernels of their own, one after the other.
    """
    weight = weight.reshape(*weight.shape, *(1,) * (x.ndim - weight.ndim))
    return functools.reduce(jnp.add, [x[:, :, i] * weight[:, :, i] for i in range(x.shape[2])])


def _call(plan: Plan, splits: int, keys, values, scalars, inputs):
    counts = [3, len(inputs[0]), len(inputs[1])]
    per_query = (plan.batch, plan.heads, splits, plan.queries)
    outs = [jax.ShapeDtypeStruct((*per_query, *x), jnp.float32) for x in ((plan.channels,), (), ())]
    scratch = [keys.scratch(), values.scratch()]
    counts += [len(outs), len(scratch[0]), len(scratch[1])]

    def body(*refs):
        parts, i = [], 0
        for n in counts:
            parts.append(refs[i : i + n])
            i += n
        _program(plan, splits, keys, values, *parts, *refs[i:])

    barriers = [
        plgpu.Barrier(num_arrivals=keys.copies(), num_barriers=plan.slots),
        plgpu.Barrier(num_arrivals=values.copies(), num_barriers=plan.slots),
        plgpu.Barrier(num_arrivals=keys.begin_copies()),
    ]
    kernel = plgpu.kernel(
        body,
        out_type=outs,
        grid=(splits, plan.heads, plan.batch),
        grid_names=("split", "head", "row"),
        scratch_types=[*scratch[0], *scratch[1], *barriers],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plan.interpret} if plan.interpret else {}),
    )
    return kernel(*scalars, *inputs[0], *inputs[1])


def _program(plan: Plan, splits: int, keys, values, scalars, k_src, v_src, outs, k_dst, v_dst, k_bar, v_bar, q_bar):
    layer_ref, first_ref, last_ref = scalars
    split, head, row = (lax.axis_index(n) for n in ("split", "head", "row"))
    first, last = jnp.maximum(first_ref[row], 0), jnp.minimum(last_ref[row], plan.blocks * plan.tokens)
    low, high = first // plan.tokens, -(-last // plan.tokens)
    chunks = jnp.where(last > first, -(-(high - low) // plan.run), 0)
    share = -(-chunks // splits)
    begin, end = split * share, jnp.minimum((split + 1) * share, chunks)
    base = (layer_ref[0] * plan.batch + row) * plan.blocks
    program = At(layer_ref[0], row, head, base)

    def at(i):
        # The last chunk is moved back to end with the last block needed, and not beyond the arrays: blocks that it
        # shares with its neighbour are masked.
        start = jnp.minimum(low + i * plan.run, jnp.maximum(high - plan.run, 0))
        return dataclasses.replace(program, start=jnp.minimum(start, plan.length - plan.run - base))

    def fetch(decoder, i, src, dst, barrier):
        slot = lax.rem(i - begin, plan.slots)
        decoder.fetch(src, dst, at(i), slot, barrier.at[slot])

    @pl.when(begin < end)
    def _():
        keys.begin(k_src, k_dst, program, q_bar)

    for s in range(plan.slots):

        @pl.when(begin + s < end)
        def _(s=s):
            fetch(keys, begin + s, k_src, k_dst, k_bar)
            fetch(values, begin + s, v_src, v_dst, v_bar)

    def chunk(i, carry):
        top, total, state = carry
        slot = lax.rem(i - begin, plan.slots)
        own = (low + i * plan.run) * plan.tokens
        plgpu.barrier_wait(k_bar.at[slot])
        for n, planes in enumerate(plan.rounds):
            scores = keys.scores(k_dst, at(i), slot, planes)
            scores = _mask(plan, scores, planes, at(i).start * plan.tokens, jnp.maximum(first, own), last)
            new = scores[0]
            for s in scores[1:]:
                new = jnp.maximum(new, s)
            new = jnp.maximum(top, jnp.max(new, axis=0))
            alpha = jnp.exp2(top - new)
            weights = [jnp.exp2(s - over_rows(new, ROWS)) for s in scores]
            total = total * over_rows(alpha, ROWS) + sum(weights[1:], weights[0])
            top = new
            if n == 0:
                plgpu.barrier_wait(v_bar.at[slot])
            if n == len(plan.rounds) - 1:
                _next(plan, i, end, lambda j: fetch(keys, j, k_src, k_dst, k_bar))
            state = values.add((*v_dst, *k_dst[: values.borrows]), at(i), slot, planes, weights, alpha, state)
        _next(plan, i, end, lambda j: fetch(values, j, v_src, v_dst, v_bar))
        return top, total, state

    empty = full((plan.columns,), EMPTY, plan.interpret), full((ROWS, plan.columns), 0.0, plan.interpret)
    top, total, state = lax.fori_loop(begin, end, chunk, (*empty, values.init()))
    answer, *columns = (ref.at[row, head, split] for ref in outs)
    values.store(answer, state)
    for ref, x in zip(columns, (top, jnp.sum(total, axis=0))):
        store_column(ref, x, plan.interpret)


def _next(plan: Plan, i, end, fetch) -> None:
    # All warps have read the slot before the copy engine fills it again.
    plgpu.commit_smem()

    @pl.when(i + plan.slots < end)
    def _():
        fetch(i + plan.slots)


def _mask(plan: Plan, scores: list, planes: range, base, first, last) -> list:
    """Hides tokens outside of `first <= t < last`; a chunk that lies within pays one comparison."""
    tokens = plan.run * plan.tokens

    def hide(scores):
        shape = (ROWS, plan.columns)
        if plan.interpret:
            row = lax.broadcasted_iota(jnp.int32, shape, 0)
        else:
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        token = plan.token(row, 0) + base
        hidden = []
        for p, s in zip(planes, scores):
            t = token + p * plan.rows
            hidden.append(jnp.where((t >= first) & (t < last), s, jnp.float32(EMPTY)))
        return tuple(hidden)

    inside = (base >= first) & (base + tokens <= last)
    return list(lax.cond(inside, lambda s: s, hide, tuple(scores)))


def load_column(ref, interpret) -> jax.Array:
    """`ref[columns]` in shared memory, one value per column of a tile."""
    return ref[...] if interpret else plgpu.load(ref, layout=COLUMN)
