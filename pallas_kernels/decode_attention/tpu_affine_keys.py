"""TPU decoders of affine keys: the query takes the scales, so that codes meet it as they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_codes as codes
from pallas_kernels.decode_attention import tpu_metadata as metadata
from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_plan import LANES, Plan
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step, over_runs


def products(q: jax.Array, words: jax.Array, bits: int) -> jax.Array:
    """`[rows, tokens]`: sum over planes of weight times `q[rows, H] . plane`, tokens in the order of `codes`."""
    parts = [
        weight * lax.dot_general(q, plane, CONTRACT_LANES, preferred_element_type=jnp.float32)
        for weight, plane in zip(codes.plane_weights(bits), codes.operands(words, bits))
    ]
    return sum(parts[1:], parts[0])


@dataclasses.dataclass(frozen=True)
class KeysPerChannel:
    """Scale and zero of each channel for `g` tokens in a row.

    A query scaled for each group of a run are so many rows of one product; a token keeps the row of its group. With
    `x = scale * (code - middle) + (zero + middle * scale)` the part that does not depend on the code is one number per
    query and group, itself a product of the scaled queries with a constant.
    """

    fmt: Affine
    plan: Plan

    @property
    def groups(self) -> int:
        """Per run."""
        return self.fmt.scale.shape[-2] * self.plan.unit

    @property
    def order(self) -> np.ndarray:
        return codes.order(self.plan.unit, self.plan.tokens, self.fmt.bits)

    def operands(self):
        channels = self.plan.channels
        constant = np.concatenate([np.full((channels, LANES), -codes.offset(self.fmt.bits)), np.ones((channels, LANES))])
        group = self.order // (self.plan.run_tokens // self.groups)
        return [
            *(self.plan.stored(x) for x in (self.fmt.codes, self.fmt.scale, self.fmt.zero)),
            self.plan.constant(jnp.asarray(constant, jnp.bfloat16)),
            self.plan.constant(np.broadcast_to(group.astype(np.int32), (self.plan.rows, self.plan.run_tokens))),
        ]

    def scratch(self):
        rows, runs = self.groups * self.plan.rows, self.plan.runs
        return [
            pltpu.VMEM((runs, rows, 2 * self.plan.channels), jnp.bfloat16),
            pltpu.VMEM((runs, rows, LANES), jnp.float32),
        ]

    def start(self, refs: Refs, q: jax.Array) -> None:
        pass

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        _, scale_ref, zero_ref, constant, _, scaled_ref, rest_ref = refs
        unit, unroll, channels = self.plan.unit, self.plan.unroll, self.plan.channels

        def fold(run, carry):
            blocks = pl.ds(run * unit, unit)
            scale, zero = (
                metadata.to_float(ref[blocks].reshape(self.groups, channels), self.fmt.dtype)
                for ref in (scale_ref, zero_ref)
            )
            zero = zero + jnp.float32(codes.middle(self.fmt.bits)) * scale
            scale = scale * jnp.float32(codes.step(self.fmt.bits))
            for ref_part, x in enumerate((scale, zero)):
                rows = [q * x[j : j + 1] for j in range(self.groups)]
                part = slice(ref_part * channels, (ref_part + 1) * channels)
                scaled_ref[run, :, part] = jnp.concatenate(rows, axis=0).astype(jnp.bfloat16)
            return carry

        over_runs(self.plan, fold, 0)

        def reduce(i, carry):
            runs = pl.ds(i * unroll, unroll)
            rows = scaled_ref[runs].reshape(-1, 2 * channels)
            rest = jnp.dot(rows, constant[...], preferred_element_type=jnp.float32)
            rest_ref[runs] = rest.reshape(unroll, -1, LANES)
            return carry

        lax.fori_loop(0, self.plan.runs // unroll, reduce, 0)

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        code_ref, _, _, _, group_ref, scaled_ref, rest_ref = refs
        words = code_ref[pl.ds(run * self.plan.unit, self.plan.unit)]
        all_groups = products(scaled_ref[run, :, : self.plan.channels], words, self.fmt.bits)
        rest = jnp.concatenate([rest_ref[run]] * (self.plan.run_tokens // LANES), axis=1)
        all_groups = (all_groups + rest).reshape(self.groups, self.plan.rows, self.plan.run_tokens)
        score = all_groups[0]
        for j in range(1, self.groups):
            score = jnp.where(group_ref[...] == j, all_groups[j], score)
        return score


@dataclasses.dataclass(frozen=True)
class KeysPerToken:
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    The query masked to each group of channels are the rows of one product, each multiplied by its tokens' scales.
    """

    fmt: Affine
    plan: Plan

    @property
    def groups(self) -> int:
        return self.fmt.scale.shape[-2]

    @property
    def order(self) -> np.ndarray:
        return codes.order(self.plan.unit, self.plan.tokens, self.fmt.bits)

    def operands(self):
        return [self.plan.stored(self.fmt.codes), *metadata.token_operands(self.fmt, self.plan, self.order)]

    def scratch(self):
        rows = self.groups * self.plan.rows
        return [
            pltpu.VMEM((rows, self.plan.channels), jnp.bfloat16),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            *metadata.token_scratch(self.fmt, self.plan),
        ]

    def start(self, refs: Refs, q: jax.Array) -> None:
        q_ref, offset_ref, sum_ref = refs[4:7]
        q = q * jnp.float32(codes.step(self.fmt.bits))
        channel = lax.broadcasted_iota(jnp.int32, q.shape, 1)
        size = self.plan.channels // self.groups
        rows = [jnp.where((channel >= j * size) & (channel < (j + 1) * size), q, 0.0) for j in range(self.groups)]
        rows = jnp.concatenate(rows, axis=0)
        q_ref[...] = rows.astype(jnp.bfloat16)
        held = q_ref[...].astype(jnp.float32).sum(axis=1, keepdims=True) * jnp.float32(codes.offset(self.fmt.bits))
        offset_ref[...] = jnp.broadcast_to(held, offset_ref.shape)
        total = rows.sum(axis=1, keepdims=True) * jnp.float32(1 / codes.step(self.fmt.bits))
        sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        metadata.token_chunk(self.fmt, self.plan, refs[1:4], refs[7:])

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        words = refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]
        q_ref, offset_ref, sum_ref = refs[4:7]
        product = products(q_ref[...], words, self.fmt.bits)
        scale, zero = metadata.token_rows(refs[7:], run, self.groups)
        score = jnp.zeros((self.plan.rows, self.plan.run_tokens), jnp.float32)
        for j in range(self.groups):
            rows = slice(j * self.plan.rows, (j + 1) * self.plan.rows)
            score += (product[rows] - offset_ref[rows, :1]) * scale[j : j + 1] + sum_ref[rows, :1] * zero[j : j + 1]
        return score
