"""TPU decoders of uncompressed storage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Dense
from pallas_kernels.decode_attention.tpu_plan import Plan
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Loaded, Refs, Step


@dataclasses.dataclass(frozen=True)
class _Dense:
    """bfloat16 as it stands."""

    fmt: Dense
    plan: Plan

    @property
    def order(self) -> np.ndarray:
        return np.arange(self.plan.run_tokens)

    def operands(self):
        return [self.plan.stored(self.fmt.values)]

    def _run(self, ref, run) -> jax.Array:
        """`[run_tokens, H]` bfloat16."""
        words = ref[pl.ds(run * self.plan.unit, self.plan.unit)]
        return pltpu.bitcast(words.reshape(self.plan.run_tokens, self.plan.channels), jnp.bfloat16)


class DenseKeys(_Dense):
    def scratch(self):
        return [pltpu.VMEM((self.plan.rows, self.plan.channels), jnp.bfloat16)]

    def start(self, refs: Refs, q: jax.Array) -> None:
        refs[1][...] = q.astype(jnp.bfloat16)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        pass

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        ref, q = refs
        return lax.dot_general(q[...], self._run(ref, run), CONTRACT_LANES, preferred_element_type=jnp.float32)


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
        value = self._run(refs[0], run)
        return (sums[0] + jnp.dot(p.astype(jnp.bfloat16), value, preferred_element_type=jnp.float32),)

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        return sums[0]
