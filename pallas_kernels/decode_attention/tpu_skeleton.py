"""The TPU decode-attention kernel: flash decoding over chunks of packed blocks, with a decoder for each storage.

The grid is (row, kv head, chunk of the context). Per chunk, all runs are scored first; the maximum is updated once;
then each run's weights meet its values. Scores are in units of log 2: the query is multiplied by log2(e) on the way
in. Decoders see the chunk in VMEM and choose in which *order* they have the tokens of a run: attention does not care,
as long as keys, values, masks and per-token metadata agree. Where the orders of keys and values differ, the skeleton
permutes the weights.

A decoder of keys may have a method `prepare(refs, i, q)` for what is better done for several runs at once, such as
scaled queries. It is called before each iteration of as many runs as the decoder's own `plan.unroll` says, and `scores`
then takes the run's place in the iteration (a Python integer) as an argument after `run`, to find what was prepared.

The weights of a chunk's tokens are relative to the chunk's own largest score, and so are the sums that `add` carries,
which begin at 0 with each chunk. A decoder of values may carry other numbers than its float32 sums: then it has the
methods `zeros()`, what the chunk begins with, and `collect(refs, carried)`, the sums at its end. If it has a true
`narrow`, the sum of weights is carried per lane of a register and not per token of a run.

A decoder works on `refs`: its operands' blocks, in the order of `operands()`, and then its scratch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Partial
from pallas_kernels.decode_attention.tpu_plan import BF16_ARITHMETIC, LANES, SUBLANES, Operand, Plan, divided

EMPTY = -1e30
CONTRACT_LANES = (((1,), (1,)), ((), ()))  # x @ y.T
LOG2_E = float(np.log2(np.e))
Refs = Any  # a list of refs
Loaded = tuple[jax.Array, ...]


class Step(NamedTuple):
    """Where the grid is: traced int32 scalars. `block` is the first block of the chunk."""

    row: jax.Array
    head: jax.Array
    chunk: jax.Array
    block: jax.Array


class KeyDecoder(Protocol):
    """Turns stored keys into scores.

    Attributes:
      order: int array `[run_tokens]`: which token of a run stands at each position. Every run has the same.
      plan: that of the kernel, but for `unroll`.
    """

    plan: Plan

    @property
    def order(self) -> np.ndarray: ...

    def operands(self) -> list[Operand]:
        """Arrays to fetch (see `Plan`)."""

    def scratch(self) -> list[Any]:
        """VMEM scratch, as `pltpu.VMEM(shape, dtype)`."""

    def start(self, refs: Refs, q: jax.Array) -> None:
        """Once per row and kv head, before its first chunk: tables, folded queries.

        Args:
          q: `[R, H]` float32, times softmax scale and log2(e); the query heads, padded by zeros to
            `R / plan.copies` rows and repeated `plan.copies` times; results are read from the first copy.
        """

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        """Once per chunk: metadata, queries rotated to the chunk."""

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        """`[R, run_tokens]` float32 of one run (a traced index within the chunk), tokens in `order`."""


class ValueDecoder(Protocol):
    """Adds weighted values up.

    Attributes:
      order: as of keys; weights arrive in this order.
      plan: as of keys.
    """

    plan: Plan

    @property
    def order(self) -> np.ndarray: ...

    def operands(self) -> list[Operand]: ...

    def scratch(self) -> list[Any]: ...

    def accumulators(self) -> list[tuple[int, int]]:
        """Shapes of the float32 sums over tokens: rows are a multiple of R, query heads varying fastest."""

    def start(self, refs: Refs) -> None: ...

    def chunk(self, refs: Refs, step: Step) -> None: ...

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        """The sums plus those of one run with weights `p[R, run_tokens]` (float32; 0 where masked)."""

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        """`[R, H]` from the sums over all tokens."""


def decode(
    q: jax.Array,
    keys: KeyDecoder,
    values: ValueDecoder,
    plan: Plan,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    interpret: Any,
) -> Partial:
    """Runs the kernel; arguments as of `api.decode_attention`."""
    batch, heads, group, channels = q.shape
    q = jnp.pad(q * LOG2_E, ((0, 0), (0, 0), (0, plan.rows // plan.copies - group), (0, 0)))
    q = jnp.tile(q, (1, 1, plan.copies, 1))
    first, last = jnp.maximum(first, 0), jnp.minimum(last, plan.blocks * plan.tokens)
    used = jnp.maximum(plan.count(first, last).max(), 1)  # grid steps: as many as the longest row needs
    fixed = _fixed_operands(keys, values, plan)
    operands = [*fixed, *keys.operands(), *values.operands()]
    scratch = [
        *(pltpu.VMEM((plan.rows, LANES), jnp.float32) for _ in range(2)),
        pltpu.VMEM((plan.runs, plan.rows, plan.run_tokens), jnp.float32),
        pltpu.VMEM((plan.run_tokens // LANES, pl.cdiv(plan.runs, SUBLANES) * SUBLANES, LANES), jnp.float32),
        *(pltpu.VMEM(shape, jnp.float32) for shape in values.accumulators()),
        *keys.scratch(),
        *values.scratch(),
    ]
    counts = [len(fixed), len(keys.operands()), len(values.operands()), 3, 4]
    counts += [len(values.accumulators()), len(keys.scratch()), len(values.scratch())]
    head_spec = pl.BlockSpec((None, None, plan.rows, channels), lambda b, k, c, *_: (b, k, 0, 0))
    row_spec = pl.BlockSpec((None, None, plan.rows, LANES), lambda b, k, c, *_: (b, k, 0, 0))
    acc, top, total = pl.pallas_call(
        functools.partial(_kernel, keys=keys, values=values, plan=plan, counts=counts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, used),
            in_specs=[head_spec, *(x.spec for x in operands)],
            out_specs=[head_spec, row_spec, row_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, plan.rows, width), jnp.float32) for width in (channels, LANES, LANES)
        ],
        # A check of a copy's bounds costs a dozen scalar instructions; blocks and layers are clamped.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="decode_attention",
    )(layer.reshape(1), first, last, q, *(x.array for x in operands))
    # Back from log 2; the maximum of a row that saw nothing is left as it is.
    top = jnp.where(top == EMPTY, EMPTY, top / LOG2_E)
    return Partial(acc[:, :, :group], top[:, :, :group, 0], total[:, :, :group, 0])


def _fixed_operands(keys: KeyDecoder, values: ValueDecoder, plan: Plan) -> list[Operand]:
    """The token at each position, `[8, run_tokens]`, and, if the orders differ, the permutation between them."""
    token = np.broadcast_to(np.asarray(keys.order, np.int32), (SUBLANES, plan.run_tokens))
    fixed = [plan.constant(token)]
    if not np.array_equal(keys.order, values.order):
        matrix = np.asarray(keys.order)[:, None] == np.asarray(values.order)[None, :]
        fixed.append(plan.constant(jnp.asarray(matrix, jnp.bfloat16)))
    return fixed


@dataclasses.dataclass
class _Own:
    """The skeleton's refs: running maximum and sum (lane-replicated), scores and mask of a chunk, sums of values."""

    top: Any
    total: Any
    scores: Any
    mask: Any
    sums: Any
    token: Any
    permutation: Any


def _kernel(layer, first, last, q_ref, *refs, keys, values, plan: Plan, counts):
    fixed, key_in, value_in, out, own, sums, key_scratch, value_scratch = _split(refs, counts)
    key_refs, value_refs = [*key_in, *key_scratch], [*value_in, *value_scratch]
    own = _Own(own[0], own[1], own[2], own[3], sums, fixed[0], fixed[1] if len(fixed) > 1 else None)
    b, k, c = (pl.program_id(axis) for axis in range(3))
    begin, end = first[b], last[b]
    step = Step(b, k, c, plan.start(begin, c))

    @pl.when(c == 0)
    def _():
        own.top[...] = jnp.full_like(own.top, EMPTY)
        for ref in (own.total, *sums):
            ref[...] = jnp.zeros_like(ref)
        keys.start(key_refs, q_ref[...])
        values.start(value_refs)

    @pl.when(c < plan.count(begin, end))
    def _():
        keys.chunk(key_refs, step, q_ref[...])
        values.chunk(value_refs, step)
        # A chunk that was moved back holds tokens of the one before.
        seen_from = jnp.maximum(begin, (plan.begin(begin) + c * plan.chunk_blocks) * plan.tokens)
        offset = step.block * plan.tokens
        top, shrink = _score(keys, key_refs, own, q_ref, seen_from - offset, end - offset)
        _weigh(values, value_refs, own, top, shrink)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        out[0][...] = values.finish(value_refs, tuple(ref[...] for ref in sums))
        out[1][...] = own.top[...]
        out[2][...] = own.total[...]


def _score(keys: Any, refs: Refs, own: _Own, q_ref: Any, begin: jax.Array, end: jax.Array) -> Loaded:
    """Masked scores of the chunk into scratch; their maximum, and what rescales the sums so far, lane-replicated."""
    plan, prepare = keys.plan, getattr(keys, "prepare", None)
    _mask(own, plan, begin, end)

    def run_scores(run, place, top):
        if place == 0 and prepare is not None:
            prepare(refs, divided(run, plan.unroll), q_ref[...])
        scores = keys.scores(refs, run) if prepare is None else keys.scores(refs, run, place)
        mask = [own.mask.at[n][pl.ds(run, 1)] for n in range(own.mask.shape[0])]
        scores += jnp.concatenate(mask, axis=1)  # exactly EMPTY, if so
        own.scores[run] = scores
        return jnp.maximum(top, scores)

    top = over_runs(plan, run_scores, jnp.full((plan.rows, plan.run_tokens), EMPTY, jnp.float32))
    before, top = own.top[...], _lanes(jnp.max(top, axis=1, keepdims=True))
    own.top[...] = jnp.maximum(before, top)
    return top, jnp.exp2(before - own.top[...])


def _mask(own: _Own, plan: Plan, begin: jax.Array, end: jax.Array) -> None:
    """Rows of 0 for tokens of the chunk that are seen and EMPTY for others, in the order of keys, a run per row."""
    run = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    for n in range(own.mask.shape[0]):
        for first in range(0, own.mask.shape[1], SUBLANES):
            token = own.token[:, n * LANES : (n + 1) * LANES] + (run + first) * plan.run_tokens
            own.mask[n, first : first + SUBLANES] = jnp.where((token >= begin) & (token < end), 0.0, EMPTY)


def _weigh(values: Any, refs: Refs, own: _Own, chunk_top: jax.Array, shrink: jax.Array) -> None:
    """Adds the chunk's weights and weighted values to the running sums."""
    plan = values.plan
    top = _columns(chunk_top, plan.run_tokens)
    narrow = getattr(values, "narrow", False)
    zeros = jnp.zeros((plan.rows, LANES if narrow else plan.run_tokens), jnp.float32)

    def weights(run):
        return jnp.exp2(own.scores[run] - top)

    if own.permutation is not None:

        def permute(run, place, total):
            p = weights(run)
            # Exact but for P's rounding to bf16, which the product with V needs anyway.
            own.scores[run] = jnp.dot(p.astype(jnp.bfloat16), own.permutation[...], preferred_element_type=jnp.float32)
            return total + (folded(p) if narrow else p)

        total = over_runs(plan, permute, zeros)

    def add(run, place, carry):
        total, sums = carry
        if own.permutation is None:
            p = weights(run)
            total = total + (folded(p) if narrow else p)
        else:
            p = own.scores[run]
        return total, values.add(refs, run, p, sums)

    begin = getattr(values, "zeros", None)
    sums = tuple(jnp.zeros(ref.shape, ref.dtype) for ref in own.sums) if begin is None else begin()
    total, sums = over_runs(plan, add, (zeros if own.permutation is None else total, sums))
    sums = sums if begin is None else values.collect(refs, sums)
    grow = jnp.exp2(chunk_top - own.top[...])
    own.total[...] = own.total[...] * shrink + jnp.sum(total, axis=1, keepdims=True) * grow
    for ref, x in zip(own.sums, sums):
        ref[...] = ref[...] * _rows(shrink, ref.shape) + x * _rows(grow, ref.shape)


def over_runs(plan: Plan, body, carry):
    """`carry = body(run, place in the iteration, carry)` for the runs of a chunk."""

    def several(i, carry):
        for j in range(plan.unroll):
            carry = body(i * plan.unroll + j, j, carry)
        return carry

    return lax.fori_loop(0, plan.runs // plan.unroll, several, carry)


def read_anew(
    ref: Any, i: jax.Array, plan: Plan, first: int = 0, size: int | None = None, always: bool = False
) -> jax.Array:
    """Rows of a constant in VMEM, for place `i` (below 2**20) of a loop.

    On v5 the address is the same for every `i` in a way that the compiler cannot see: otherwise it reads once for many
    places, holds that in registers all the while, and spills. Later chips gain nothing by it, unless `always`.
    """
    size = ref.shape[0] if size is None else size
    if plan.chip in BF16_ARITHMETIC and not always:
        return ref[first : first + size]
    zero = lax.shift_right_logical(i, jnp.int32(20)) * ref.shape[0]
    return ref[pl.ds(zero + first, size)]


def folded(x: jax.Array) -> jax.Array:
    """The sum `[R, 128]` of the 128 lanes of each register of `x[R, n * 128]`."""
    return functools.reduce(jnp.add, [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)])


def _lanes(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (x.shape[0], LANES))


def _columns(x: jax.Array, width: int) -> jax.Array:
    """A lane-replicated `[R, 128]` as `[R, width]`."""
    return jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def _rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A lane-replicated `[R, 128]` as `[n * R, width]`."""
    return jnp.concatenate([_columns(x, shape[1])] * (shape[0] // x.shape[0]), axis=0)


def _split(refs, counts):
    parts, at = [], 0
    for n in counts:
        parts.append(list(refs[at : at + n]))
        at += n
    return parts
