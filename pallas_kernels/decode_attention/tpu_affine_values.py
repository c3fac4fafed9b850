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
from pallas_kernels.decode_attention.tpu_products import RoundedWeights, weight_rows
from pallas_kernels.decode_attention.tpu_skeleton import Loaded, Refs, Step
from pallas_kernels.decode_attention.tpu_token_metadata import TokenMetadata


@dataclasses.dataclass(frozen=True)
class ValuesPerToken:
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    Weights times the scales of each group of channels are the rows of one product; the sums keep, at the end, each
    group's channels. Where a kv head has few queries, the rows of a register hold copies of them, and each copy takes
    another group. Where heads stand side by side, each query takes the groups of its own head. Beside the products
    stand sums of weights times zeros, per token until the end.
    """

    fmt: Affine
    plan: Plan

    @property
    def metadata(self) -> TokenMetadata:
        return TokenMetadata(self.fmt, self.plan, self.encoding)

    @property
    def heads(self) -> int:
        """Side by side, with groups of their own."""
        return self.fmt.joined if self.fmt.groups > 1 else 1

    @property
    def groups(self) -> int:
        """Of a head."""
        return self.fmt.groups // self.heads

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
        return [*self.products.scratch(), *self.metadata.scratch()]

    @property
    def products(self) -> RoundedWeights:
        rows = self.groups // self.copies * self.plan.rows
        return weight_rows(self.encoding, rows, self.plan.channels, self.plan.run_tokens)

    def accumulators(self):
        return [self._zero_shape, *self.products.shapes()]

    @property
    def _zero_shape(self) -> tuple[int, int]:
        """Of the sums of weights times zeros, per token until the end."""
        return self.groups // self.copies * self.plan.rows, self.plan.run_tokens

    def start(self, refs: Refs) -> None:
        pass

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs]:
        """Operands of the metadata, scratch of the products, and that of the metadata."""
        count = 1 + self.metadata.count
        own = count + len(self.products.scratch())
        return refs[1:count], refs[count:own], refs[own:]

    def chunk(self, refs: Refs, step: Step) -> None:
        operands, own, scratch = self._split(refs)
        self.metadata.chunk(operands, scratch, step, lambda largest: self.products.bound(own, largest))

    def zeros(self) -> Loaded:
        return jnp.zeros(self._zero_shape, jnp.float32), *self.products.zeros()

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        words = refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]
        scaled, zeros = (
            jnp.concatenate([p * self._rows(ref, run, m) for m in range(0, self.groups, self.copies)], axis=0)
            for ref in self._split(refs)[2][:2]
        )
        return sums[0] + zeros, *self.products.add(scaled, words, sums[1:])

    def collect(self, refs: Refs, sums: Loaded) -> Loaded:
        return sums[0], *self.products.collect(self._split(refs)[1], sums[1:])

    def _rows(self, ref, run: jax.Array, first: int) -> jax.Array:
        copies = self.copies if self.heads == 1 else self.plan.copies  # heads vary fastest within a copy
        groups = [first + c * self.copies // copies for c in range(copies)]
        rows = [self.metadata.row(ref, run, h * self.groups + group) for group in groups for h in range(self.heads)]
        return by_copy(rows, self.plan.rows)

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        rows, channels = self.plan.rows, self.plan.channels
        products = self.products.finish(sums[1:]) + sums[0].sum(axis=1, keepdims=True)
        out = products[:rows]
        size = channels // self.heads
        channel = lax.broadcasted_iota(jnp.int32, (rows, channels), 1)
        channel = channel if self.heads == 1 else lax.rem(channel, jnp.full_like(channel, size))
        for j in range(1, self.groups):
            register, copy = divmod(j, self.copies)
            part = products[register * rows : (register + 1) * rows]
            # The first copy is the one that is read.
            part = jnp.roll(part, -copy * (rows // self.copies), axis=0) if copy else part
            out = jnp.where(channel >= j * (size // self.groups), part, out)
        return out
