"""Scales and zeros per token on TPU, in the order of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_codes import Encoding
from pallas_kernels.decode_attention.tpu_metadata import float_scratch, read_floats, split, store_floats
from pallas_kernels.decode_attention.tpu_plan import Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import SingleRows, read_single, single_rows, single_scratch
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step


class TokenMetadata:
    """Scale and (centred) zero of each token, brought to the order of a decoder for several runs at once.

    A permutation of tokens is a product with a matrix of zeros and ones; scales and zeros go through it as two
    bfloat16 each. Where the order mixes the tokens of several blocks, each block has its own matrix and the results
    add up.
    """

    def __init__(self, fmt: Affine, plan: Plan, encoding: Encoding):
        self.fmt, self.plan, self.encoding = fmt, plan, encoding
        self.groups = fmt.scale.shape[-2]
        order = encoding.order(plan.unit, plan.tokens)
        self.together = plan.unit
        while (
            self.together > 1 and (order[: self.together * plan.tokens // 2] < self.together * plan.tokens // 2).all()
        ):
            self.together //= 2
        self.order = order[: self.together * plan.tokens]
        single = self.groups == 1
        self.single = [SingleRows(x, fmt.dtype, plan) for x in (fmt.scale, fmt.zero)] if single else []

    @property
    def count(self) -> int:
        """Operands."""
        return sum(x.count for x in self.single) + 1 if self.single else 3

    def operands(self) -> list[Operand]:
        tokens = self.plan.tokens
        matrix = np.arange(self.together * tokens)[:, None] == self.order[None, :]
        matrix = np.concatenate(np.split(matrix, self.together, axis=0), axis=1)
        stored = [self.plan.stored(x) for x in (self.fmt.scale, self.fmt.zero)]
        if self.single:
            stored = [operand for x in self.single for operand in x.operands()]
        return [*stored, self.plan.constant(jnp.asarray(matrix, jnp.bfloat16))]

    def scratch(self) -> list[Any]:
        rows, tokens = self.plan.unroll * self.plan.unit * self.groups, self.plan.tokens
        shape = (rows, self.together**2 * tokens)
        raw = [float_scratch(rows, tokens) for _ in range(2)]
        if self.single:
            raw = single_scratch(self.single)
        return [*(pltpu.VMEM(shape, jnp.float32) for _ in range(2)), *raw]

    def chunk(self, operands: Refs, scratch: Refs, step: Step) -> None:
        if self.single:
            read_single(self.single, operands[:-1], scratch[2:], step)

    def prepare(self, operands: Refs, scratch: Refs, i: jax.Array) -> None:
        """Scale, and zero plus the scale of the middle code, of an iteration's runs into scratch."""
        blocks = self.plan.unroll * self.plan.unit
        rows, tokens = blocks * self.groups, self.plan.tokens
        if self.single:
            scale, zero = single_rows(scratch[2:], i * blocks, blocks)
        else:
            for ref, raw in zip(operands, scratch[2:]):
                store_floats(ref[pl.ds(i * blocks, blocks)].reshape(rows, tokens), self.fmt.dtype, raw)
            scale, zero = (read_floats(raw) for raw in scratch[2:])
        zero = zero + jnp.float32(self.encoding.middle) * scale
        parts = jnp.concatenate([*split(scale), *split(zero)], axis=0)
        parts = jnp.dot(parts, operands[-1][...], preferred_element_type=jnp.float32)
        for n, out in enumerate(scratch[:2]):
            out[...] = parts[2 * n * rows : (2 * n + 1) * rows] + parts[(2 * n + 1) * rows : (2 * n + 2) * rows]

    def row(self, ref: Any, place: int, group: int) -> jax.Array:
        """`[1, run_tokens]` of one group of channels of a run that was prepared."""
        width = self.together * self.plan.tokens
        pieces = []
        for i in range(0, self.plan.unit, self.together):
            at = [(place * self.plan.unit + i + n) * self.groups + group for n in range(self.together)]
            parts = [ref[row : row + 1, n * width : (n + 1) * width] for n, row in enumerate(at)]
            pieces.append(sum(parts[1:], parts[0]))
        return jnp.concatenate(pieces, axis=1)
