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
    read_floats,
    split,
    store_floats,
)
from pallas_kernels.decode_attention.tpu_plan import LANES, Plan
from pallas_kernels.decode_attention.tpu_rows import SingleRows, read_single, single_rows, single_scratch
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step
from pallas_kernels.decode_attention.tpu_token_metadata import TokenMetadata


def products(q: jax.Array, operands: list[jax.Array], encoding: codes.Encoding) -> jax.Array:
    """`[rows, tokens]`: `q[rows, H]` times the operands of `encoding`."""
    parts = []
    for weight, operand in zip(encoding.weights, operands):
        part = lax.dot_general(q, operand, CONTRACT_LANES, preferred_element_type=jnp.float32)
        parts.append(part if weight == 1 else weight * part)
    return sum(parts[1:], parts[0])


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
        count = 4 + (sum(x.count for x in self.single) or 2)
        return refs[1:4], refs[4:count], refs[count : count + 5], refs[count + 5 :]

    def operands(self):
        rows, tokens = self.plan.rows, self.plan.run_tokens
        group = self.order // (tokens // self.groups)  # at each position
        spread = np.arange(LANES)[:, None] == group
        copy = np.arange(rows)[:, None] // (rows // self.copies)
        choices = (np.broadcast_to(group, (rows, tokens)), (copy - group) % self.copies)
        metadata = [self.plan.stored(x) for x in (self.fmt.scale, self.fmt.zero)]
        if self.single:
            metadata = [operand for x in self.single for operand in x.operands()]
        return [
            self.plan.stored(self.fmt.codes),
            self.plan.constant(jnp.asarray(spread, jnp.bfloat16)),
            *(self.plan.constant(x.astype(np.int32)) for x in choices),
            *metadata,
        ]

    def scratch(self):
        """Scales and zeros, both parts of the scores that no code enters, and scaled queries, of an iteration."""
        plan, rows = self.plan, self.groups // self.copies * self.plan.rows
        metadata = float_scratch(plan.unroll * self.groups, plan.channels)
        shared = pltpu.VMEM((plan.unroll, plan.rows, plan.run_tokens), jnp.float32)
        scaled = pltpu.VMEM((plan.unroll, rows, plan.channels), jnp.bfloat16)
        single = single_scratch(self.single) if self.single else []
        return [metadata, metadata, shared, scaled, pltpu.VMEM((plan.unroll, rows, LANES), jnp.float32), *single]

    def expand(self, refs: Refs, i: jax.Array) -> None:
        """Scales and zeros of one iteration's runs, as float32."""
        blocks = self.plan.unroll * self.plan.unit
        rows = self.plan.unroll * self.groups
        _, operands, scratch, single = self._split(refs)
        if self.single:
            for x, out in zip(single_rows(single, i * blocks, blocks), scratch):
                for n in range(out.shape[0]):
                    out[n] = x[:, n * LANES : (n + 1) * LANES]
            return
        for ref, out in zip(operands, scratch):
            bits = ref[pl.ds(i * blocks, blocks)].reshape(rows, self.plan.channels)
            store_floats(bits, self.fmt.dtype, out)

    def shared_part(self, spread: jax.Array, scratch: Refs, q: jax.Array) -> None:
        """The part of the scores that does not depend on codes, for one iteration's runs.

        In 16 bits and not in 8, since what the tokens of a group share does not average out.
        """
        scale_ref, zero_ref, out_ref = scratch
        unroll, rows = self.plan.unroll, self.plan.rows
        zero = read_floats(zero_ref) + jnp.float32(self.encoding.middle) * read_floats(scale_ref)
        if zero.shape[0] < LANES:
            zero = jnp.concatenate([zero, jnp.zeros((LANES - zero.shape[0], zero.shape[1]), zero.dtype)], axis=0)
        queries = jnp.concatenate(split(q), axis=0)
        parts = [lax.dot_general(queries, x, CONTRACT_LANES, preferred_element_type=jnp.float32) for x in split(zero)]
        both = parts[0] + parts[1]
        words = pltpu.bitcast(jnp.concatenate(split(both[:rows] + both[rows:]), axis=0), jnp.int32)
        # Each run's groups to the lanes of `spread` that are not 0.
        turned = [pltpu.roll(words, (LANES - j * self.groups) % LANES, axis=1) if j else words for j in range(unroll)]
        stacked = pltpu.bitcast(jnp.concatenate(turned, axis=0), jnp.bfloat16)
        part = jnp.dot(stacked, spread, preferred_element_type=jnp.float32).reshape(unroll, 2, rows, -1)
        out_ref[...] = part[:, 0] + part[:, 1]

    def start(self, refs: Refs, q: jax.Array) -> None:
        pass

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        _, operands, _, single = self._split(refs)
        if self.single:
            read_single(self.single, operands, single, step)

    def prepare(self, refs: Refs, i: jax.Array, q: jax.Array) -> None:
        constants, _, scratch, _ = self._split(refs)
        scale_ref, _, _, scaled_ref, offset_ref = scratch
        self.expand(refs, i)
        self.shared_part(constants[0][...], scratch[:3], q)
        q = q * jnp.float32(1 / self.encoding.gain)
        for j in range(self.plan.unroll):
            rows = []
            for m in range(0, self.groups, self.copies):
                at = j * self.groups + m
                scale = [read_floats(scale_ref, slice(at + c, at + c + 1)) for c in range(self.copies)]
                rows.append(q * by_copy(scale, self.plan.rows))
            scaled = jnp.concatenate(rows, axis=0).astype(jnp.bfloat16)
            scaled_ref[j] = scaled
            if not self.encoding.offset:
                continue
            held = scaled.astype(jnp.float32).sum(axis=1, keepdims=True)
            offset_ref[j] = jnp.broadcast_to(jnp.float32(-self.encoding.offset) * held, offset_ref.shape[1:])

    def scores(self, refs: Refs, run: jax.Array, place: int) -> jax.Array:
        (_, group_ref, shift_ref), _, (_, _, shared_ref, scaled_ref, offset_ref), _ = self._split(refs)
        height, copies = self.plan.rows, self.copies
        parts = products(scaled_ref[place], self.encoding.operands(self.words(refs, run)), self.encoding)
        if self.encoding.offset:
            parts += jnp.concatenate([offset_ref[place]] * (self.plan.run_tokens // LANES), axis=1)
        score = parts[:height]
        for m in range(1, self.groups // copies):
            score = jnp.where(group_ref[...] >= m * copies, parts[m * height : (m + 1) * height], score)
        chosen = score
        for c in range(1, copies):
            rolled = pltpu.roll(score, c * (height // copies), axis=0)
            chosen = jnp.where(shift_ref[...] == c, rolled, chosen)
        return chosen + shared_ref[place]


class KeysPerToken(_AffineKeys):
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    The query masked to each group of channels are the rows of one product, each multiplied by its tokens' scales.
    """

    @property
    def metadata(self) -> TokenMetadata:
        return TokenMetadata(self.fmt, self.plan, self.encoding)

    @property
    def groups(self) -> int:
        return self.fmt.scale.shape[-2]

    def operands(self):
        return [self.plan.stored(self.fmt.codes), *self.metadata.operands()]

    def scratch(self) -> list[Any]:
        rows = self.groups * self.plan.rows
        queries = pltpu.VMEM((rows, self.plan.channels), jnp.bfloat16)
        return [queries, *(pltpu.VMEM((rows, LANES), jnp.float32) for _ in range(2)), *self.metadata.scratch()]

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs]:
        """Operands of the metadata, own scratch, and that of the metadata."""
        count = 1 + self.metadata.count
        return refs[1:count], refs[count : count + 3], refs[count + 3 :]

    def start(self, refs: Refs, q: jax.Array) -> None:
        q_ref, offset_ref, sum_ref = self._split(refs)[1]
        channel = lax.broadcasted_iota(jnp.int32, q.shape, 1)
        size = self.plan.channels // self.groups
        masked = [jnp.where((channel >= j * size) & (channel < (j + 1) * size), q, 0.0) for j in range(self.groups)]
        rows = jnp.concatenate(masked, axis=0)
        q_ref[...] = (rows * jnp.float32(1 / self.encoding.gain)).astype(jnp.bfloat16)
        held = q_ref[...].astype(jnp.float32).sum(axis=1, keepdims=True) * jnp.float32(self.encoding.offset)
        offset_ref[...] = jnp.broadcast_to(held, offset_ref.shape)
        sum_ref[...] = jnp.broadcast_to(rows.sum(axis=1, keepdims=True), sum_ref.shape)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        operands, _, scratch = self._split(refs)
        self.metadata.chunk(operands, scratch, step)

    def prepare(self, refs: Refs, i: jax.Array, q: jax.Array) -> None:
        operands, _, scratch = self._split(refs)
        self.metadata.prepare(operands, scratch, i)

    def scores(self, refs: Refs, run: jax.Array, place: int) -> jax.Array:
        _, (q_ref, offset_ref, sum_ref), (scale_ref, zero_ref, *_) = self._split(refs)
        product = products(q_ref[...], self.encoding.operands(self.words(refs, run)), self.encoding)
        score = jnp.zeros((self.plan.rows, self.plan.run_tokens), jnp.float32)
        for j in range(self.groups):
            rows = slice(j * self.plan.rows, (j + 1) * self.plan.rows)
            part = product[rows] - offset_ref[rows, :1] if self.encoding.offset else product[rows]
            score += part * self.metadata.row(scale_ref, place, j) + sum_ref[rows, :1] * self.metadata.row(
                zero_ref, place, j
            )
        return score
