"""TPU decoders of affine keys."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_codes as codes
from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_metadata import (
    by_copy,
    float_scratch,
    largest,
    read_floats,
    split,
    store_floats,
    take_lanes,
)
from pallas_kernels.decode_attention.tpu_plan import LANES, Plan
from pallas_kernels.decode_attention.tpu_products import RoundedQueries, query_rows, splat
from pallas_kernels.decode_attention.tpu_single_rows import SingleRows, read_single, single_rows, single_scratch
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step
from pallas_kernels.decode_attention.tpu_token_metadata import TokenMetadata


@dataclasses.dataclass(frozen=True)
class _AffineKeys:
    fmt: Affine
    plan: Plan

    @property
    def encoding(self) -> codes.Encoding:
        return codes.encoding(self.fmt.bits, self.plan.chip)

    @property
    def order(self) -> np.ndarray:
        return self.encoding.order(self.plan.unit, self.plan.tokens)

    def words(self, refs: Refs, run: jax.Array) -> jax.Array:
        return refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]


class KeysPerChannel(_AffineKeys):
    """Scale and zero of each channel for `g` tokens in a row: `x = scale * (code - middle) + (zero + middle * scale)`.

    For the first part the query takes the scales: queries scaled for each group of a run are rows of one product, and
    a token keeps the row of its group. Where a kv head has few queries, the rows of a register hold copies of them,
    and each copy is scaled for another group. (Scaling the codes instead, where the chip has bfloat16 arithmetic, was
    no faster by the static count and up to 2.5 times less accurate.) The second part is one number per query and
    group, computed for many runs at once and spread over the tokens by a product with zeros and ones.
    """

    @property
    def groups(self) -> int:
        """Per run."""
        return self.fmt.scale.shape[-2] * self.plan.unit

    @property
    def group(self) -> np.ndarray:
        """`[run_tokens]`: the group at each position."""
        return self.order // (self.plan.run_tokens // self.groups)

    @property
    def copies(self) -> int:
        return math.gcd(self.plan.copies, self.groups)

    @property
    def single(self) -> list[SingleRows]:
        """Scale and zero where a block has one group."""
        if self.fmt.scale.shape[-2] > 1:
            return []
        return [SingleRows(x, self.fmt.dtype, self.plan) for x in (self.fmt.scale, self.fmt.zero)]

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs, Refs]:
        """Constants, operands of the metadata, scratch, and that of single rows."""
        count = 3 + (sum(x.count for x in self.single) or 2)
        own = count + len(self._own_scratch())
        return refs[1:3], refs[3:count], refs[count:own], refs[own:]

    @property
    def queries(self) -> RoundedQueries:
        rows = self.groups // self.copies * self.plan.rows
        return query_rows(self.encoding, self.plan.unroll, rows, self.plan.channels)

    def operands(self):
        rows, tokens = self.plan.rows, self.plan.run_tokens
        group = self.group
        copy = np.arange(rows)[:, None] // (rows // self.copies)
        choices = (np.broadcast_to(group, (rows, tokens)), (copy - group) % self.copies)
        metadata = [self.plan.stored(x, whole=True) for x in (self.fmt.scale, self.fmt.zero)]
        if self.single:
            metadata = [operand for x in self.single for operand in x.operands()]
        return [
            self.plan.stored(self.fmt.codes),
            *(self.plan.constant(x.astype(np.int32)) for x in choices),
            *metadata,
        ]

    def _own_scratch(self) -> list[Any]:
        """Scales and zeros, the part of the scores that no code enters, and scaled queries, of an iteration."""
        plan = self.plan
        metadata = float_scratch(plan.unroll * self.groups, plan.channels)
        shared = pltpu.VMEM((plan.rows, pl.cdiv(plan.unroll * self.groups, LANES) * LANES), jnp.float32)
        return [metadata, metadata, shared, *self.queries.scratch()]

    def scratch(self):
        return [*self._own_scratch(), *(single_scratch(self.single) if self.single else [])]

    def expand(self, refs: Refs, i: jax.Array) -> None:
        """Scales and zeros of one iteration's runs, as float32."""
        blocks = self.plan.unroll * self.plan.unit
        _, operands, scratch, single = self._split(refs)
        if self.single:
            for x, out in zip(single_rows(single, i * blocks, blocks), scratch):
                for n in range(out.shape[0]):
                    out[n] = x[:, n * LANES : (n + 1) * LANES]
            return
        for ref, out in zip(operands, scratch):
            store_floats(ref, i * blocks, self.plan, self.fmt.dtype, out)

    def shared_part(self, scratch: Refs, q: jax.Array) -> None:
        """The part of the scores that does not depend on codes, a lane for each group of one iteration's runs.

        In 16 bits and not in 8, since what the tokens of a group share does not average out.
        """
        scale_ref, zero_ref, out_ref = scratch
        rows = self.plan.rows
        zero = read_floats(zero_ref)
        if self.encoding.middle:
            zero = zero + jnp.float32(self.encoding.middle) * read_floats(scale_ref)
        if missing := out_ref.shape[1] - zero.shape[0]:
            zero = jnp.concatenate([zero, jnp.zeros((missing, zero.shape[1]), zero.dtype)], axis=0)
        queries = jnp.concatenate(split(q), axis=0)
        parts = [lax.dot_general(queries, x, CONTRACT_LANES, preferred_element_type=jnp.float32) for x in split(zero)]
        both = parts[0] + parts[1]
        out_ref[...] = both[:rows] + both[rows:]

    def start(self, refs: Refs, q: jax.Array) -> None:
        pass

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        _, operands, (_, _, _, *queries), single = self._split(refs)
        if self.single:
            read_single(self.single, operands, single, step)
        if not self.encoding.integer:
            return
        if self.single:
            scale = single_rows(single, jnp.int32(0), self.plan.chunk_blocks)[0]
            scale = jnp.abs(scale).max(axis=0, keepdims=True)
        else:
            scale = largest(operands[0], self.fmt.dtype, self.plan)
        self.queries.bound(queries, jnp.abs(q * scale).max(keepdims=True))

    def prepare(self, refs: Refs, i: jax.Array, q: jax.Array) -> None:
        _, _, (scale_ref, zero_ref, shared_ref, *queries), _ = self._split(refs)
        self.expand(refs, i)
        self.shared_part((scale_ref, zero_ref, shared_ref), q)
        q = self.queries.factor(queries, q)
        for j in range(self.plan.unroll):
            rows = []
            for m in range(0, self.groups, self.copies):
                at = j * self.groups + m
                scale = [read_floats(scale_ref, slice(at + c, at + c + 1)) for c in range(self.copies)]
                rows.append(q * by_copy(scale, self.plan.rows))
            self.queries.put(queries, j, jnp.concatenate(rows, axis=0))

    def scores(self, refs: Refs, run: jax.Array, place: int) -> jax.Array:
        (group_ref, shift_ref), _, (_, _, shared_ref, *queries), _ = self._split(refs)
        parts = self.queries.products(queries, place, self.words(refs, run))
        inverse = self.queries.inverse(queries)
        scores = []
        for n in range(self.plan.run_tokens // LANES):
            lanes = slice(n * LANES, (n + 1) * LANES)
            group = group_ref[:, lanes]
            score = self.queries.combine([self._own_group(x[:, lanes], group, n) for x in parts])
            chosen = score
            for c in range(1, self.copies):
                rolled = pltpu.roll(score, c * (self.plan.rows // self.copies), axis=0)
                chosen = jnp.where(shift_ref[:, lanes] == c, rolled, chosen)
            chosen = chosen if inverse is None else chosen * splat(inverse, chosen.shape)
            scores.append(chosen + self._shared(shared_ref, group, place * self.groups))
        return jnp.concatenate(scores, axis=1)

    def _shared(self, ref: Any, group: jax.Array, first: int) -> jax.Array:
        """`[R, 128]`: the part of the scores that tokens of a group share, of a run with group `first` and on."""
        tile, lane = divmod(first, LANES)
        assert lane + self.groups <= LANES
        return take_lanes(ref[:, tile * LANES : (tile + 1) * LANES], group + jnp.int32(lane))

    def _own_group(self, part: jax.Array, group: jax.Array, tile: int) -> jax.Array:
        """`[R, 128]` of `part[groups / copies * R, 128]`: of each token the rows with its group."""
        height = self.plan.rows
        first, *others = sorted(set(self.group[tile * LANES : (tile + 1) * LANES] // self.copies))
        chosen = part[first * height : (first + 1) * height]
        for m in others:
            chosen = jnp.where(group >= int(m) * self.copies, part[m * height : (m + 1) * height], chosen)
        return chosen


class KeysPerToken(_AffineKeys):
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    The query masked to each group of channels are the rows of one product, each multiplied by its tokens' scales.
    """

    @property
    def metadata(self) -> TokenMetadata:
        return TokenMetadata(self.fmt, self.plan, self.encoding)

    @property
    def groups(self) -> int:
        return self.fmt.groups

    def operands(self):
        return [self.plan.stored(self.fmt.codes), *self.metadata.operands()]

    @property
    def queries(self) -> RoundedQueries:
        return query_rows(self.encoding, 1, self.groups * self.plan.rows, self.plan.channels)

    def scratch(self) -> list[Any]:
        sums = pltpu.VMEM((self.groups * self.plan.rows, LANES), jnp.float32)
        return [sums, *self.queries.scratch(), *self.metadata.scratch()]

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs]:
        """Operands of the metadata, own scratch, and that of the metadata."""
        count = 1 + self.metadata.count
        own = count + 1 + len(self.queries.scratch())
        return refs[1:count], refs[count:own], refs[own:]

    def start(self, refs: Refs, q: jax.Array) -> None:
        sum_ref, *queries = self._split(refs)[1]
        channel = lax.broadcasted_iota(jnp.int32, q.shape, 1)
        size = self.plan.channels // self.groups
        masked = [jnp.where((channel >= j * size) & (channel < (j + 1) * size), q, 0.0) for j in range(self.groups)]
        rows = jnp.concatenate(masked, axis=0)
        self.queries.bound(queries, jnp.abs(rows).max(keepdims=True))
        self.queries.put(queries, 0, self.queries.factor(queries, rows))
        sum_ref[...] = jnp.broadcast_to(rows.sum(axis=1, keepdims=True), sum_ref.shape)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        operands, (_, *queries), scratch = self._split(refs)
        self.metadata.chunk(operands, scratch, step, lambda _: self.queries.inverse(queries))

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        _, (sum_ref, *queries), (scale_ref, zero_ref, *_) = self._split(refs)
        product = self.queries.combine(self.queries.products(queries, 0, self.words(refs, run)))
        score = jnp.zeros((self.plan.rows, self.plan.run_tokens), jnp.float32)
        for j in range(self.groups):
            rows = slice(j * self.plan.rows, (j + 1) * self.plan.rows)
            sums = jnp.concatenate([sum_ref[rows]] * (self.plan.run_tokens // LANES), axis=1)
            score += product[rows] * self.metadata.row(scale_ref, run, j)
            score += sums * self.metadata.row(zero_ref, run, j)
        return score
