"""TPU decoder of affine values: the weights take the scales."""

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
from pallas_kernels.decode_attention.tpu_metadata import by_copy
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Plan
from pallas_kernels.decode_attention.tpu_products import RoundedWeights, weight_rows
from pallas_kernels.decode_attention.tpu_skeleton import Loaded, Refs, Step, folded
from pallas_kernels.decode_attention.tpu_token_metadata import TokenMetadata

MOST_CARRIED = 24  # registers of sums


@dataclasses.dataclass(frozen=True)
class ValuesPerToken:
    """Scale and zero of each token, for the channels of a group or the whole kv width.

    Weights times the scales of each group of channels are the rows of one product; the sums keep, at the end, each
    group's channels. Where a kv head has few queries, the rows of a register hold copies of them, and each copy takes
    another group. Where heads stand side by side, each query takes the groups of its own head. Beside the products
    stand sums of weights times zeros.
    """

    fmt: Affine
    plan: Plan

    @property
    def narrow(self) -> bool:
        """Whether sums over tokens are carried as one register's lanes.

        On 7x with many queries only: int8 with 4 would take 27.8 bundles and not 27.5; kivi4 with 16 takes 64.0 and not
        64.6, and has 26 spills rather than 59.
        """
        return self.plan.chip != "7x" or self.plan.rows > SUBLANES

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
        return [*self.products.scratch(), *self._sums_scratch(), *self.metadata.scratch()]

    def _carried(self) -> list[jax.ShapeDtypeStruct]:
        """Sums of weights times zeros, and of products."""
        return [jax.ShapeDtypeStruct(self._zero_shape, jnp.float32), *self.products.carried()]

    def _sums_scratch(self) -> list[Any]:
        """For what is carried through a chunk, where that would leave few registers for anything else.

        kivi4 with 16 queries: 4 spills and 73.0 bundles rather than 220 and 74.2 on v6e, 146 and 72.3 rather than 330
        and 72.6 on v5e; with heads of 256, where it would be 1598 and 229.7, 101 and 217.2.
        """
        carried = self._carried()
        if sum(math.prod(x.shape) for x in carried) <= MOST_CARRIED * SUBLANES * LANES:
            return []
        return [pltpu.VMEM(x.shape, x.dtype) for x in carried]

    @property
    def products(self) -> RoundedWeights:
        rows = self.groups // self.copies * self.plan.rows
        return weight_rows(self.encoding, rows, self.plan.channels)

    def accumulators(self):
        return [self._zero_shape, *self.products.shapes()]

    @property
    def _zero_shape(self) -> tuple[int, int]:
        """Of the sums of weights times zeros, per token until the end, or per lane."""
        return self.groups // self.copies * self.plan.rows, LANES if self.narrow else self.plan.run_tokens

    def start(self, refs: Refs) -> None:
        pass

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs, Refs]:
        """Operands of the metadata, scratch of the products, of the sums, and of the metadata."""
        count = 1 + self.metadata.count
        own = count + len(self.products.scratch())
        sums = own + len(self._sums_scratch())
        return refs[1:count], refs[count:own], refs[own:sums], refs[sums:]

    def chunk(self, refs: Refs, step: Step) -> None:
        operands, own, sums, scratch = self._split(refs)
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)
        self.metadata.chunk(operands, scratch, step, lambda largest: self.products.bound(own, largest))

    def zeros(self) -> Loaded:
        return () if self._sums_scratch() else tuple(jnp.zeros(x.shape, x.dtype) for x in self._carried())

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        words = refs[0][pl.ds(run * self.plan.unit, self.plan.unit)]
        _, _, memory, metadata = self._split(refs)
        scaled, zeros = (
            jnp.concatenate([p * self._rows(ref, run, m) for m in range(0, self.groups, self.copies)], axis=0)
            for ref in metadata[:2]
        )
        old = tuple(ref[...] for ref in memory) if memory else sums
        new = old[0] + (folded(zeros) if self.narrow else zeros), *self.products.add(scaled, words, old[1:])
        for ref, x in zip(memory, new):
            ref[...] = x
        return () if memory else new

    def collect(self, refs: Refs, sums: Loaded) -> Loaded:
        _, own, memory, _ = self._split(refs)
        sums = tuple(ref[...] for ref in memory) if memory else sums
        return sums[0], *self.products.collect(own, sums[1:])

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
