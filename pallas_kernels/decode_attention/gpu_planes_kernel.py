"""The kernel of `gpu_planes`: copies that are issued or not, beside an online softmax.

A program takes one row, one kv head and one split of its blocks, block by block:

    wait for the keys of block n; scores; start the copies of the keys of block n + 1
    running maximum and sum; decide the level of block n's values; start their copies; weights to shared memory
    wait for the values; add P V

Each plane has a barrier of its own, which is waited for where its copy was started, and nowhere else. Meanwhile the
other programs of the multiprocessor compute: there are three, or two if their queries are more than four.

A value's level depends on its own score: the maximum m and sum l of what the program has seen so far, with what the
caller knows of other tokens, bound its probability from above, exp(s - m) / l, which is compared with the `limits` of
`Planes`. A program knows its own split only, so many splits may read more than one would.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_planes_tiles as tiles
from pallas_kernels.decode_attention.gpu_answers import store_column, store_tile
from pallas_kernels.decode_attention.gpu_skeleton import LOG2E, load_column
from pallas_kernels.decode_attention.gpu_tiles import ROWS, full, over_rows, parts, swizzled
from pallas_kernels.decode_attention.gpu_wgmma import multiply
from pallas_kernels.decode_attention.gpu_words import value_channel
from pallas_kernels.decode_attention.reference import EMPTY

f32 = jnp.float32
PLANES = range(3)
LIFT = 15  # weights are times 2**15: float16 holds them from 2**-39 of the largest on


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a call: those of the storage, queries, columns (two per query, in whole eights), splits; `online`
    where values are read by limits."""

    batch: int
    heads: int
    blocks: int
    channels: int
    queries: int
    columns: int
    splits: int
    online: bool
    interpret: Any

    @property
    def tiles(self) -> int:
        """Of 64 channels."""
        return -(-self.channels // ROWS)

    def scratch(self) -> list:
        """Shared memory: planes of keys and of values, queries, weights, two numbers per column; barriers."""
        keys, values = (
            [plgpu.SMEM(shape, jnp.uint32, transforms=tiles.LINES) for shape in shapes]
            for shapes in tiles.shapes(self.channels)
        )
        operand = swizzled(8, 16)
        q = plgpu.SMEM((self.columns, self.tiles * ROWS), jnp.float16, transforms=operand)
        p = plgpu.SMEM((len(tiles.TILES), self.columns, ROWS), jnp.float16, transforms=operand)
        column = plgpu.SMEM((self.columns,), f32)
        planes = plgpu.Barrier(num_arrivals=1, num_barriers=len(PLANES))
        return [keys, values, q, p, column, column, planes, planes, plgpu.Barrier(num_arrivals=3)]

    def shared(self) -> list:
        return [x for x in jax.tree.leaves(self.scratch()) if not isinstance(x, plgpu.Barrier)]

    def results(self) -> list:
        """One program's answer, and of all programs of a row and head the levels that values were read to."""
        per_query = (self.batch, self.heads, self.splits, self.queries)
        answer = [jax.ShapeDtypeStruct((*per_query, *x), f32) for x in ((self.channels,), (), ())]
        return [*answer, jax.ShapeDtypeStruct((self.batch, self.heads, self.blocks), jnp.uint8)]


class _Refs(NamedTuple):
    layer: Any  # [1]
    first: Any  # [B]
    last: Any  # [B]
    key_levels: Any  # [B, N, K]
    value_rule: Any  # [3 or 1, B, N, K]
    q: Any  # [B, K, columns, H]
    unit: Any  # [B, K, columns]
    known: Any  # [B, K, columns], in units of log2, as weights times 2**LIFT
    planes: Any  # [6] of [L * B * N * K, ...]
    results: Any


def call(plan: Plan, arrays: list) -> list:
    """The kernel over `arrays`, as `_Refs` names them: `results`."""
    outs = plan.results()

    def body(*refs):
        known = len(_Refs._fields) - 2
        ends = known + 2 * len(PLANES), known + 2 * len(PLANES) + len(outs)
        groups = refs[known : ends[0]], refs[ends[0] : ends[1]]
        _Program(plan, _Refs(*refs[:known], *groups), *refs[ends[1] :]).run()

    kernel = plgpu.kernel(
        body,
        out_type=outs,
        grid=(plan.splits, plan.heads, plan.batch),
        grid_names=("split", "head", "row"),
        scratch_types=plan.scratch(),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plan.interpret} if plan.interpret else {}),
    )
    return kernel(*arrays)


class _Program:
    def __init__(self, plan: Plan, refs: _Refs, keys, values, q, weights, unit, known, k_bar, v_bar, q_bar):
        self.plan, self.refs = plan, refs
        self.k_planes, self.v_planes, self.k_bar, self.v_bar, self.q_bar = keys, values, k_bar, v_bar, q_bar
        self.q, self.weights, self.unit, self.known = q, weights, unit, known
        self.split, self.head, self.row = (lax.axis_index(n) for n in ("split", "head", "row"))
        self.first = jnp.maximum(refs.first[self.row], 0)
        self.last = jnp.minimum(refs.last[self.row], plan.blocks * tiles.TOKENS)
        low, high = self.first // tiles.TOKENS, -(-self.last // tiles.TOKENS)
        share = -(-jnp.where(self.last > self.first, high - low, 0) // plan.splits)
        self.begin = low + self.split * share
        self.end = jnp.where(self.last > self.first, jnp.minimum(self.begin + share, high), self.begin)
        self.base = (refs.layer[0] * plan.batch + self.row) * plan.blocks

    def run(self) -> None:
        plan, interpret = self.plan, self.plan.interpret
        level = self._key_level(self.begin)

        @pl.when(self.begin < self.end)
        def _():
            self._start(level, self.begin, self.refs.planes[:3], self.k_planes, self.k_bar)
            for source, here in ((self.refs.q, self.q), (self.refs.unit, self.unit), (self.refs.known, self.known)):
                plgpu.copy_gmem_to_smem(source.at[self.row, self.head], here, self.q_bar)
            plgpu.barrier_wait(self.q_bar)

        none = tuple(full((ROWS, plan.columns), 0.0, interpret) for _ in range(plan.tiles))
        top, total = (full((plan.columns,), x, interpret) for x in (EMPTY, 0.0))
        top, total, acc, _ = lax.fori_loop(self.begin, self.end, self._block, (top, total, none, level))
        answer, *columns = (ref.at[self.row, self.head, self.split] for ref in self.refs.results[:-1])
        for tile, x in enumerate(acc):
            store_tile(answer, x, functools.partial(value_channel, tile=tile), interpret, paired=True)
        for ref, x in zip(columns, (top, total)):
            store_column(ref, x, interpret, paired=True)

    def _block(self, n, carry):
        top, total, acc, level = carry
        plan = self.plan
        # Loads from device memory: asked for before the wait, used after it.
        following, rule = self._key_level(n + 1), self._value_rule(n)
        self._wait(level, self.k_bar)
        scores = self._scores(level, n)
        plgpu.commit_smem()  # all warps have read the keys, and the values before
        more = jnp.where(n + 1 < self.end, following, 0)
        self._start(more, n + 1, self.refs.planes[:3], self.k_planes, self.k_bar)
        own = jnp.max(jnp.maximum(*scores), axis=0)
        new = jnp.maximum(top, own)
        alpha = jnp.exp2(top - new)
        weights = [jnp.exp2(s - over_rows(new - f32(LIFT), ROWS)) for s in scores]
        total = total * alpha + jnp.sum(weights[0] + weights[1], axis=0)
        read = self._value_level(rule, own, new, total)
        self._start(read, n, self.refs.planes[3:], self.v_planes, self.v_bar)
        self.refs.results[-1][self.row, self.head, n] = read.astype(jnp.uint8)
        tiles.store_weights(self.weights, weights, plan.interpret)
        plgpu.commit_smem()  # they are there for the products
        self._wait(read, self.v_bar)
        added = self._values(read)
        lifted = over_rows(alpha, ROWS)
        return new, total, tuple(a * lifted + x for a, x in zip(acc, added)), following

    # Copies

    def _start(self, level, n, planes, here, barrier) -> None:
        at = (self.base + n) * self.plan.heads + self.head
        for i in PLANES:

            @pl.when(level > i)
            def _(i=i):
                plgpu.copy_gmem_to_smem(planes[i].at[at], here[i], barrier.at[i])

    def _wait(self, level, barrier) -> None:
        for i in PLANES:

            @pl.when(level > i)
            def _(i=i):
                plgpu.barrier_wait(barrier.at[i])

    # Levels

    def _key_level(self, n):
        return self.refs.key_levels[self.row, jnp.minimum(n, self.plan.blocks - 1), self.head]

    def _value_rule(self, n) -> list:
        return [self.refs.value_rule[i, self.row, n, self.head] for i in (PLANES if self.plan.online else range(1))]

    def _value_level(self, rule, own, top, total):
        """The level of a block's values: `own`, its largest scores, beside those and the sums of all so far."""
        if not self.plan.online:
            return rule[0]
        known = load_column(self.known, self.plan.interpret)
        seen = top + jnp.log2(total)
        most = jnp.maximum(seen, known)
        log_sum = most + jnp.log2(jnp.exp2(seen - most) + jnp.exp2(known - most))
        largest = tiles.largest(own - log_sum, self.plan.interpret) * f32(1 / LOG2E) + f32(LIFT / LOG2E)
        return sum((largest > limit).astype(jnp.int32) for limit in rule)

    # Products

    def _by_level(self, level, count: int, read: Callable) -> tuple:
        """`read(planes)`, so many tiles, of the level; zeros at level 0."""
        zero = full((ROWS, self.plan.columns), 0.0, self.plan.interpret)

        def at(some):
            if some == 0:
                return (zero,) * count
            return lax.cond(level == some, lambda: tuple(read(some)), lambda: at(some - 1))

        return at(len(PLANES))

    def _scores(self, level, n) -> list:
        """Scores of a block's tokens in units of log2, hidden where they are not seen."""
        plan = self.plan

        def read(some: int) -> list:
            sums: list[Any] = [None] * len(tiles.TILES)
            for part in parts(plan.channels):
                for p, tile in enumerate(tiles.keys(self.k_planes[:some], part, plan.interpret)):
                    s = multiply([(tile, 0)], self.q, plan.columns, plan.interpret, part.start)
                    sums[p] = s if sums[p] is None else sums[p] + s
            return sums

        unit = over_rows(load_column(self.unit, plan.interpret), ROWS)
        scores = self._by_level(level, len(tiles.TILES), read)
        return self._mask([tiles.joined_columns(s, plan.interpret) * unit for s in scores], n * tiles.TOKENS)

    def _mask(self, scores: list, base) -> list:
        def hide(scores):
            shape = (ROWS, self.plan.columns)
            layout = {} if self.plan.interpret else {"layout": plgpu.Layout.WGMMA}
            iota = lax.broadcasted_iota if self.plan.interpret else plgpu.broadcasted_iota
            row = iota(jnp.int32, shape, 0, **layout)
            hidden = []
            for p, s in enumerate(scores):
                token = tiles.token(row, p) + base
                hidden.append(jnp.where((token >= self.first) & (token < self.last), s, f32(EMPTY)))
            return tuple(hidden)

        inside = (base >= self.first) & (base + tiles.TOKENS <= self.last)
        return list(lax.cond(inside, lambda s: s, hide, tuple(scores)))

    def _values(self, level) -> tuple:
        plan = self.plan

        def read(some: int) -> list:
            found = []
            for tile in range(plan.tiles):
                pairs = tiles.values(self.v_planes[:some], tile, plan.interpret)
                operands = [(x, p * plan.columns) for p, x in enumerate(pairs)]
                found.append(multiply(operands, self.weights, plan.columns, plan.interpret))
            return found

        return self._by_level(level, plan.tiles, read)
