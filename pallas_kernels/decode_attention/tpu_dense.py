"""TPU decoders of uncompressed storage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Dense
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, float32, split
from pallas_kernels.decode_attention.tpu_plan import LANES, Plan
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Loaded, Refs, Step

CONTRACT_SUBLANES = (((1,), (0,)), ((), ()))  # x @ y


@dataclasses.dataclass(frozen=True)
class _Dense:
    """bfloat16 as it stands; float16 rounded to it by integer operations, since TPU has no float16.

    XLA keeps tokens and not channels on lanes where channels would not fill them: blocks are then `[H, T]`, and what
    looks like a transposition of the cache moves nothing. (As `[T, H]` XLA copied the whole cache for each call.)
    """

    fmt: Dense
    plan: Plan

    @property
    def transposed(self) -> bool:
        return self.plan.channels % LANES != 0

    @property
    def order(self) -> np.ndarray:
        return np.arange(self.plan.run_tokens)

    def operands(self):
        values = self.fmt.values
        return [self.plan.stored(values.swapaxes(-1, -2) if self.transposed else values)]

    def pieces(self, ref, run: jax.Array) -> list[jax.Array]:
        """Of a run, `[H, T]` per block or `[run_tokens, H]`, bfloat16."""
        blocks = pl.ds(run * self.plan.unit, self.plan.unit)
        if self.transposed:
            bits = ref[blocks]
            return [self._bfloat16(bits[n]) for n in range(self.plan.unit)]
        return [self._bfloat16(ref[blocks].reshape(self.plan.run_tokens, self.plan.channels))]

    def _bfloat16(self, bits: jax.Array) -> jax.Array:
        if self.fmt.dtype == "bfloat16":
            return pltpu.bitcast(bits, jnp.bfloat16)
        pairs = pltpu.bitcast(bits, jnp.int32)  # two rows of a column
        low, high = (pltpu.bitcast(float32(x, "float16"), jnp.int32) + 0x8000 for x in (pairs << 16, pairs & HIGH_HALF))
        return pltpu.bitcast(lax.shift_right_logical(low, jnp.full_like(low, 16)) | (high & HIGH_HALF), jnp.bfloat16)


class DenseKeys(_Dense):
    def scratch(self):
        return [pltpu.VMEM((2 * self.plan.rows, self.plan.channels), jnp.bfloat16)]

    def start(self, refs: Refs, q: jax.Array) -> None:
        refs[1][...] = jnp.concatenate(split(q), axis=0)  # rows of a product are free

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        pass

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        ref, q = refs
        contract = CONTRACT_SUBLANES if self.transposed else CONTRACT_LANES
        parts = [
            lax.dot_general(q[...], piece, contract, preferred_element_type=jnp.float32)
            for piece in self.pieces(ref, run)
        ]
        both = jnp.concatenate(parts, axis=1)
        return both[: self.plan.rows] + both[self.plan.rows :]


class DenseValues(_Dense):
    def scratch(self):
        return []

    def accumulators(self):
        return [(self.plan.rows, self.plan.channels)]

    def start(self, refs: Refs) -> None:
        pass

    def chunk(self, refs: Refs, step: Step) -> None:
        pass

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        contract = CONTRACT_LANES if self.transposed else CONTRACT_SUBLANES
        pieces, total = self.pieces(refs[0], run), sums[0]
        width = self.plan.run_tokens // len(pieces)
        for n, piece in enumerate(pieces):
            weights = p[:, n * width : (n + 1) * width].astype(jnp.bfloat16)
            total += lax.dot_general(weights, piece, contract, preferred_element_type=jnp.float32)
        return (total,)

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        return sums[0]
