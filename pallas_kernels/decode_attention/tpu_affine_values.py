"""TPU decoder of affine values: the weights take the scales."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention import tpu_codes as codes
from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_metadata import by_copy
from pallas_kernels.decode_attention.tpu_plan import Plan
from pallas_kernels.decode_attention.tpu_skeleton import Loaded, Refs, Step
from pallas_kernels.decode_attention.tpu_token_metadata import TokenMetadata


@dataclasses.dataclass(frozen=True)
class ValuesPerToken:
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    Weights times the scales of each group of channels are the rows of one product; the sums keep, at the end, each
    group's channels. Where a kv head has few queries, the rows of a register hold copies of them, and each copy takes
    another group. Beside the products stand sums of weights times zeros, per token until the end, and of the scaled
    weights as they were rounded, for the operands' offset.
    """

    fmt: Affine
    plan: Plan

    @property
    def metadata(self) -> TokenMetadata:
        return TokenMetadata(self.fmt, self.plan, self.encoding)

    @property
    def groups(self) -> int:
        return self.fmt.scale.shape[-2]

    @property
    def copies(self) -> int:
        """Groups per R rows."""
        return math.gcd(self.plan.copies, self.groups)

    @property
    def encoding(self) -> codes.Encoding:
        return codes.encoding(self.fmt.bits, self.plan.chip)

    @property
    def order(self) -> np.ndarray:
        return self.encoding.order(self.plan.unit, self.plan.tokens)

    def operands(self):
        return [self.plan.stored(self.fmt.codes), *self.metadata.operands()]

    def scratch(self):
        return self.metadata.scratch()

    def accumulators(self):
        rows = self.groups // self.copies * self.plan.rows
        sums = [(rows, self.plan.channels), (rows, self.plan.run_tokens)]
        return [*sums, (rows, self.plan.run_tokens)] if self.encoding.offset else sums

    def start(self, refs: Refs) -> None:
        pass

    def _split(self, refs: Refs) -> tuple[Refs, Refs]:
        """Operands and scratch of the metadata."""
        count = 1 + self.metadata.count
        return refs[1:count], refs[count:]

    def chunk(self, refs: Refs, step: Step) -> None:
        self.metadata.chunk(*self._split(refs), step)

    def prepare(self, refs: Refs, i: jax.Array) -> None:
        self.metadata.prepare(*self._split(refs), i)

    def add(self, refs: Refs, run: jax.Array, place: int, p: jax.Array, sums: Loaded) -> Loaded:
        words = refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]
        scaled, zeros = (
            jnp.concatenate([p * self._rows(ref, place, m) for m in range(0, self.groups, self.copies)], axis=0)
            for ref in self._split(refs)[1][:2]
        )
        scaled = scaled.astype(jnp.bfloat16)
        products = sums[0]
        for weight, operand in zip(self.encoding.weights, self.encoding.operands(words)):
            product = jnp.dot(scaled, operand, preferred_element_type=jnp.float32)
            products += product if weight == 1 else weight * product
        if not self.encoding.offset:
            return products, sums[1] + zeros
        return products, sums[1] + zeros, sums[2] + scaled.astype(jnp.float32)

    def _rows(self, ref, place: int, first: int) -> jax.Array:
        rows = [self.metadata.row(ref, place, first + c) for c in range(self.copies)]
        return by_copy(rows, self.plan.rows)

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        rows, channels = self.plan.rows, self.plan.channels
        products = sums[0]
        if self.encoding.offset:
            products -= jnp.float32(self.encoding.offset) * sums[2].sum(axis=1, keepdims=True)
        products = products * jnp.float32(1 / self.encoding.gain) + sums[1].sum(axis=1, keepdims=True)
        out = products[:rows]
        channel = lax.broadcasted_iota(jnp.int32, (rows, channels), 1)
        for j in range(1, self.groups):
            register, copy = divmod(j, self.copies)
            part = products[register * rows : (register + 1) * rows]
            # The first copy is the one that is read.
            part = jnp.roll(part, -copy * (rows // self.copies), axis=0) if copy else part
            out = jnp.where(channel >= j * (channels // self.groups), part, out)
        return out
