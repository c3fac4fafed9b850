"""TPU decoder of affine values: the weights take the scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention import tpu_codes as codes
from pallas_kernels.decode_attention import tpu_metadata as metadata
from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_plan import LANES, Plan
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Loaded, Refs, Step


@dataclasses.dataclass(frozen=True)
class ValuesPerToken:
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    Weights times the scales of each group of channels are the rows of one product; the sums keep, at the end, each
    group's channels. Beside them stand the sums of scaled weights (for the constant part of the operands) and of
    weights times zeros.
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
        return metadata.token_scratch(self.fmt, self.plan)

    def accumulators(self):
        rows = self.groups * self.plan.rows
        return [(rows, self.plan.channels), (rows, LANES), (self.plan.rows, LANES)]

    def start(self, refs: Refs) -> None:
        pass

    def chunk(self, refs: Refs, step: Step) -> None:
        metadata.token_chunk(self.fmt, self.plan, refs[1:4], refs[4:])

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        words = refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]
        scale, zero = metadata.token_rows(refs[4:], run, self.groups)
        scaled = jnp.concatenate([p * scale[j : j + 1] for j in range(self.groups)], axis=0).astype(jnp.bfloat16)
        products = sums[0]
        for weight, plane in zip(codes.plane_weights(self.fmt.bits), codes.operands(words, self.fmt.bits)):
            products += weight * jnp.dot(scaled, plane, preferred_element_type=jnp.float32)
        ones = jnp.ones((LANES, self.plan.run_tokens), jnp.bfloat16)
        held = lax.dot_general(scaled, ones, CONTRACT_LANES, preferred_element_type=jnp.float32)
        high, low = metadata.split(zero)
        zeros = jnp.concatenate([high, low, jnp.zeros((LANES - 2 * self.groups, high.shape[1]), high.dtype)], axis=0)
        rest = lax.dot_general(p.astype(jnp.bfloat16), zeros, CONTRACT_LANES, preferred_element_type=jnp.float32)
        return products, sums[1] + held, sums[2] + rest

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        products, held, rest = sums
        rows, channels = self.plan.rows, self.plan.channels
        products = (products - jnp.float32(codes.offset(self.fmt.bits)) * held[:, :1]) * codes.step(self.fmt.bits)
        channel = lax.broadcasted_iota(jnp.int32, (rows, channels), 1)
        out = jnp.zeros((rows, channels), jnp.float32)
        for j in range(self.groups):
            zero = rest[:, j : j + 1] + rest[:, self.groups + j : self.groups + j + 1]
            out = jnp.where(channel >= j * (channels // self.groups), products[j * rows : (j + 1) * rows] + zero, out)
        return out
