"""What a plan leaves open: the longest context, the fewest devices, the best preset, when a preset pays off."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.chips import Chip
from kvjax.model.config import ModelConfig
from kvjax.plan import Plan, meshes, plan

# Best first, by KL of real decode steps against bf16 (README, Results). Presets with kernels on TPU and Hopper; none is
# both worse and larger than another at the width of Llama-3-8B.
BY_QUALITY = ("bf16", "int8", "kivi4", "kvquant4", "kvquant3", "kivi2", "kvquant2", "kvquant2-dense")
MOST_DEVICES = 8192
_LONGEST = (1 << 30) - 1  # tokens: the most that a cache takes


@dataclasses.dataclass(frozen=True)
class Question:
    """What all plans of a search have in common; arguments of `kvjax.plan.plan`."""

    config: ModelConfig
    chip: Chip
    batch: int = 1
    dtype: Any = jnp.bfloat16

    def plan(self, quant: str, tokens: int, devices: int, mesh: Mapping[str, int] | None = None) -> Plan:
        return plan(self.config, quant, tokens, self.chip, devices, batch=self.batch, mesh=mesh, dtype=self.dtype)


def largest_context(question: Question, quant: str, devices: int, mesh: Mapping[str, int] | None = None) -> int:
    """The most tokens per row that fit; 0 where not even one does. Without a mesh, over all meshes of the devices."""
    if mesh is None:
        longest = 0
        for sizes in meshes(question.config, devices, question.batch):
            with contextlib.suppress(NotImplementedError):  # as in `plan`
                longest = max(longest, largest_context(question, quant, devices, sizes))
        return longest

    one = question.plan(quant, 1, devices, mesh)
    if not one.fits:
        return 0
    step, start = _step(question, one), one.capacity

    def at(steps: int) -> Plan:
        return question.plan(quant, start + steps * step, devices, mesh)

    # Bytes are linear in blocks but for what padding adds: from a straight line to the step next to it.
    near, far = at(64), at(192)
    steps = 64 + int((near.spare) // ((far.needed - near.needed) / 128))
    steps = max(0, min(steps, _LONGEST // step))
    while steps and not at(steps).fits:
        steps -= 1
    while steps < _LONGEST // step and at(steps + 1).fits:
        steps += 1
    return at(steps).capacity


def fewest_devices(question: Question, quant: str, tokens: int, start: int = 1) -> int | None:
    """The smallest power of two, `start` or more, of devices that hold the context; None beyond `MOST_DEVICES`."""
    devices = 1 << (start - 1).bit_length()
    while devices <= MOST_DEVICES:
        if question.plan(quant, tokens, devices).fits:
            return devices
        devices *= 2
    return None


def break_even(
    question: Question, quant: str, devices: int, mesh: Mapping[str, int], against: str = "bf16"
) -> int | None:
    """Tokens from which a device needs less memory, and reads less per step, than with another preset; None for never.

    In steps of the blocks that both presets fill at once. Below, what a preset stores besides codes outweighs them.
    """
    first, second = (question.plan(name, 1, devices, mesh) for name in (quant, against))
    unit = math.lcm(*(_step(question, p) for p in (first, second)))

    def less(steps: int) -> bool:
        a, b = (question.plan(name, steps * unit, devices, mesh) for name in (quant, against))
        return a.needed < b.needed

    high = 1
    while not less(high):
        high *= 2
        if high * unit > 1 << 22:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if less(middle) else (middle, high)
    return high * unit


def _step(question: Question, p: Plan) -> int:
    """Tokens between two capacities of a preset on a mesh, at the one of `p`."""
    return question.plan(p.quant, p.capacity + 1, p.devices, p.mesh).capacity - p.capacity


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best preset that fits, None where none does, and all that were looked at."""

    best: Plan | None
    plans: tuple[Plan, ...]


def choose(
    question: Question,
    tokens: int,
    devices: int,
    candidates: Sequence[str] = BY_QUALITY,
    max_bits: float = math.inf,
    mesh: Mapping[str, int] | None = None,
) -> Choice:
    """The first of `candidates`, best first, that fits and stores at most `max_bits` per element."""
    plans = tuple(question.plan(name, tokens, devices, mesh) for name in candidates)
    best = next((p for p in plans if p.fits and p.bits_per_element <= max_bits), None)
    return Choice(best, plans)


def way_out(question: Question, p: Plan, longest: int) -> str:
    """What would make a plan fit that does not, in words; `longest` is its `largest_context`."""
    ways = []
    if devices := fewest_devices(question, p.quant, p.tokens, p.devices + 1):
        ways.append(f"{devices} devices")
    smaller = choose(question, p.tokens, p.devices, max_bits=p.bits_per_element).best
    if smaller is not None:
        ways.append(f"{smaller.quant} ({smaller.bits_per_element:.2f} bits)")
    if longest:
        ways.append(f"at most {longest:,} tokens")
    return ", or ".join(ways) or "nothing here: the weights alone do not fit"
