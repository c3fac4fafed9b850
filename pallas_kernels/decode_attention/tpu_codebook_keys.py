"""TPU decoder of codebook keys (KVQuant): a scale per channel, rotated on the fly."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Rotation
from pallas_kernels.decode_attention.tpu_codebook import CodebookStorage
from pallas_kernels.decode_attention.tpu_key_slots import KeySlots
from pallas_kernels.decode_attention.tpu_metadata import halves
from pallas_kernels.decode_attention.tpu_plan import LANES, Operand
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step, read_anew


def turned(x: jax.Array) -> jax.Array:
    """J(x) = [b, -a] for x = [a, b] along the last axis: a quarter turn back."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([b, -a], axis=-1)


@dataclasses.dataclass(frozen=True)
class CodebookKeys(CodebookStorage):
    """Keys with a scale per channel; stored before RoPE where `rotation` is given.

    A run's scores are [q, J(q)] . [k cos, k sin]: q rotated to the run's start, cos and sin of the tokens within it.
    """

    rotation: Rotation | None
    first: jax.Array | None  # `[B]`, first token that is seen

    def operands(self) -> list[Operand]:
        out = self._operands()
        if self.rotation is None:
            return out
        plan = self.plan
        assert self.first is not None
        offsets = self.rotation.position[:, None] - self._place(plan.starts(jnp.maximum(self.first, 0)))
        start = jnp.concatenate(self.rotation.angles(offsets), axis=-1)[:, :, None]
        run = self._place(jnp.arange(plan.runs, dtype=jnp.int32) * plan.run_tokens)
        cos, sin = self.rotation.angles(self._place(jnp.asarray(self.order, jnp.int32)))  # of the tokens within a run
        wide = [jnp.concatenate([x, x], axis=-1).astype(self.levels.dtype) for x in (cos, sin)]
        out += [plan.per_chunk(start), *(plan.constant(x) for x in wide)]
        out += [plan.constant(jnp.concatenate([x, x], axis=-1)) for x in self.rotation.angles(run)]
        if self.fmt.slots:
            block = self._place(jnp.arange(plan.chunk_blocks, dtype=jnp.int32) * plan.tokens)
            out += self._slots.operands(cos[: plan.tokens], sin[: plan.tokens], *self.rotation.angles(block))
        return out

    @property
    def _slots(self) -> KeySlots:
        return KeySlots(self._words)

    def _place(self, token: jax.Array) -> jax.Array:
        assert self.rotation is not None
        return self.rotation.place(token, self.plan.tokens)

    def scratch(self) -> list[Any]:
        """Table; of q and J(q): halves for each run of an iteration, and float32 at the chunk's start; slots."""
        plan = self.plan
        rotated = [
            pltpu.VMEM((2, plan.unroll, 2 * plan.rows, plan.channels), jnp.bfloat16),
            *(pltpu.VMEM((plan.rows, plan.channels), jnp.float32) for _ in range(2)),
        ]
        return [self._table_scratch(), *rotated, *(self._slots.scratch() if self.fmt.slots else [])]

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs, Refs]:
        """Refs of `_operands()`, of the rotation, of the slots, and scratch."""
        ends = [self._count]
        ends.append(ends[0] + (0 if self.rotation is None else 5))
        ends.append(ends[1] + (self._slots.count if self.fmt.slots else 0))
        return refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] : ends[2]], refs[ends[2] :]

    def start(self, refs: Refs, q: jax.Array) -> None:
        stored, _, _, scratch = self._split(refs)
        self._make_table(stored, scratch[0])
        if self.rotation is None:
            scratch[1][0, 0] = halves(q)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        _, rotation, slots, scratch = self._split(refs)
        if not rotation:
            return
        cos, sin = _both_halves(rotation[0][...])
        q = q * cos - turned(q) * sin
        scratch[2][...], scratch[3][...] = q, turned(q)
        if self.fmt.slots:
            self._slots.chunk(slots, scratch[4:], step, scratch[2:4])

    def prepare(self, refs: Refs, i: jax.Array, q: jax.Array) -> None:
        """Queries rotated to the start of each run of an iteration."""
        _, rotation, _, scratch = self._split(refs)
        if not rotation:
            return
        plan = self.plan
        for place in range(plan.unroll):
            run = i * plan.unroll + place
            q, back = (read_anew(scratch[2 + n], run, plan) for n in range(2))
            cos, sin = (x[pl.ds(run, 1)] for x in rotation[3:])
            scratch[1][0, place] = halves(q * cos + back * sin)
            scratch[1][1, place] = halves(back * cos - q * sin)

    def _angle(self, ref: Any, run: jax.Array) -> jax.Array:
        """cos or sin of the tokens within a run.

        With heads of 256 they would fill all registers of a v6e if they stayed there: kvquant4 has 50 spills and takes
        150.6 bundles, not 384 and 152.1. (Not at 3 bits: kvquant3-dense would have none rather than 170, but take 96.4
        bundles and not 92.6. Nor on 7x, where few spill.)
        """
        anew = self.plan.chip == "v6e" and self.plan.channels > LANES and self.fmt.bits != 3
        return read_anew(ref, run, self.plan, always=anew)

    def scores(self, refs: Refs, run: jax.Array, place: int) -> jax.Array:
        stored, rotation, _, scratch = self._split(refs)
        plan = self.plan
        if self.fmt.slots:
            self._slots.prepare(scratch[4:], run, place)
        rows = [scratch[1][i, place] for i in range(2)] if rotation else [scratch[1][0, 0]]
        score = jnp.zeros((2 * plan.rows, plan.run_tokens), jnp.float32)
        for i, keys in enumerate(self._values(scratch[0], stored[0], run)):
            lanes = slice(i * LANES, min((i + 1) * LANES, plan.channels))
            turned_keys = [keys * self._angle(x, run)[:, lanes] for x in rotation[1:3]] if rotation else [keys]
            left, right = [a[:, lanes] for a in rows], [b.astype(jnp.bfloat16) for b in turned_keys]
            if self.levels.bytes and plan.channels % LANES == 0:  # one product of twice the depth
                left, right = [jnp.concatenate(left, axis=1)], [jnp.concatenate(right, axis=1)]
            for a, b in zip(left, right):
                score += lax.dot_general(a, b, CONTRACT_LANES, preferred_element_type=jnp.float32)
        score = score[: plan.rows] + score[plan.rows :]
        return score + self._slots.scores(scratch[4:], run) if self.fmt.slots else score


def _both_halves(angle: jax.Array) -> list[jax.Array]:
    """cos and sin `[1, H]`, which both halves of the channels share, from `[cos, sin]`."""
    return [jnp.concatenate([x, x], axis=1) for x in jnp.split(angle, 2, axis=1)]
