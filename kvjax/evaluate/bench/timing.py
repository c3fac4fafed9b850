"""Times of several candidates in turn, so that a busy machine slows all of them alike; the ceilings among them."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluate.bench import contents

RUNS = 2
_WARM_UP = 2
_ROW = 8192  # elements that the read-only sum adds up at a time


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one step.

    Attributes:
      median: over all calls of all runs.
      spread: of the runs' medians, the largest less the smallest, over the median.
      quartiles: between which half of the calls lie.
    """

    median: float
    spread: float
    quartiles: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
      call: runs `steps` steps and waits for them.
      steps: per call.
      nbytes: read and written in a step.
    """

    call: Callable[[], Any]
    steps: int
    nbytes: int


def interleave(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, Timed]:
    """`RUNS` runs of `rounds` calls of each candidate, in turn, after a warm-up.

    Before each timed call there is one that is not: it pays for what the candidate before has left, such as memory that
    is still being given back (milliseconds on a CPU of few cores).
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for run in range(RUNS):
        for name in candidates:
            seconds[name].append([])
        for i in range(rounds + (_WARM_UP if run == 0 else 0)):
            for name, candidate in candidates.items():
                candidate.call()
                start = time.perf_counter()
                candidate.call()
                elapsed = time.perf_counter() - start
                if run or i >= _WARM_UP:
                    seconds[name][-1].append(elapsed / candidate.steps)
    return {name: _summary(runs) for name, runs in seconds.items()}


def _summary(runs: list[list[float]]) -> Timed:
    medians = [float(np.median(run)) for run in runs]
    low, median, high = (float(x) for x in np.quantile(np.concatenate(runs), (0.25, 0.5, 0.75)))
    return Timed(median, (max(medians) - min(medians)) / median, (low, high))


def ceilings(nbytes: int) -> dict[str, Candidate]:
    """The device's memory at its best: "copy", x * 2 (as much written as read), and "read", a sum, of `nbytes`."""
    rows = max(1, nbytes // (4 * _ROW))
    sample = np.random.default_rng(0).standard_normal((64, _ROW)).astype(np.float32)
    x = contents.draw(0, sample, (rows, _ROW))
    copy, read = jax.jit(lambda x: x * 2), jax.jit(lambda x: x.sum(-1))
    return {
        "copy": Candidate(lambda: jax.block_until_ready(copy(x)), 1, 2 * x.nbytes),
        "read": Candidate(lambda: jax.block_until_ready(read(x)), 1, x.nbytes),
    }


def empty_steps(q: jax.Array, steps: int) -> Candidate:
    """The loop around the steps without attention in it: what it costs to launch a step."""
    run = jax.jit(lambda q: jax.lax.fori_loop(0, steps, lambda _, x: chained(q, jnp.sin(x)), q))
    return Candidate(lambda: jax.block_until_ready(run(q)), steps, 0)


def chained(q: jax.Array, before: jax.Array) -> jax.Array:
    """`q`, but known only after `before`, as in a decode step: no step may overlap or leave the loop."""
    return q + jnp.asarray(1e-30, q.dtype) * before.astype(q.dtype)
