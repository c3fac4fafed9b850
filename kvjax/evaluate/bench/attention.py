"""Times of decode attention over packed storage: one query per row and head, a layer of a stacked cache at a time.

A call is a compiled loop over layers whose storage together exceeds the last cache; each step's query waits for the
step before, as in a decode step. Nothing is timed whose answer is wrong (`accuracy`).
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluate.bench import accuracy, contents, device, rivals, timing
from kvjax.evaluate.bench.timing import Candidate
from kvjax.fused import side_by_side
from pallas_kernels.decode_attention import api, heads, specs
from pallas_kernels.decode_attention.formats import Format, Partial, describe

BASE = "bf16"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      storages: names of `specs.TIMED`; `BASE` is always among what is timed.
      contexts: tokens, multiples of a block or not.
      batch, heads, group, channels: rows, kv heads, query heads of each, head size.
      block: tokens per block, where a cache would not have more of a storage.
      layers: of the stacked storage; None for as many as exceed the last cache.
      rounds: calls of each candidate, in each of `timing.RUNS` runs.
      implementation, chip: as `api.decode_attention` takes them.
      seconds: no further candidate is made once this time has passed; None for no limit.
    """

    storages: tuple[str, ...]
    contexts: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    group: int = 4
    channels: int = 128
    block: int = 128
    layers: int | None = None
    rounds: int = 30
    implementation: api.Implementation = "reference"
    chip: str = ""
    seconds: float | None = None

    def shape(self, context: int, layers: int = 1) -> specs.Shape:
        blocks = -(-context // self.block)
        return specs.Shape(layers, self.batch, blocks, self.heads, self.group, self.channels, self.block)

    def stored(self, name: str, context: int, layers: int = 1) -> specs.Shape:
        """`shape` of a storage, in blocks as a cache has them where the implementation runs."""
        shape = self.shape(context, layers)
        if self.implementation == "mosaic_tpu":
            shape = specs.in_tpu_blocks(specs.TIMED[name], shape)
        return dataclasses.replace(shape, blocks=-(-context // shape.tokens))

    @property
    def joined(self) -> int:
        """How many heads a cache keeps side by side as one there."""
        return side_by_side(self.channels, self.heads, "tpu" if self.implementation == "mosaic_tpu" else "cpu")


def check(settings: Settings) -> Iterator[Row]:
    """The error of each storage on a small case: rows of `storage, status, reason, error, bound`."""

    def case(name: str) -> Callable[[], Any]:
        kinds, shape = specs.TIMED[name], settings.stored(name, settings.block)
        return accuracy.small_case(kinds, shape, settings.implementation, settings.chip, settings.joined)

    cases = _together({name: functools.partial(case, name) for name in settings.storages})
    for name in settings.storages:
        yield _attempt(name, settings, functools.partial(_run_case, cases[name]))[0]


def _run_case(case: Callable[[], Any], row: Row) -> None:
    _judge(row, *case()())


def _attempt(name: str, settings: Settings, make: Callable[[Row], Any]) -> tuple[Row, Any]:
    """A row, which `make(row)` completes, and what that returns; what it raises becomes the row's status."""
    row: Row = {"storage": name, "implementation": settings.implementation, "status": "ok", "reason": None}
    made = None
    try:
        made = make(row)
    except NotImplementedError as error:
        row |= {"status": "unsupported", "reason": _line(error)}
    except Exception as error:  # a compiler's refusal of one storage must not end the measurement of the others
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
    return row, made


def _judge(row: Row, error: accuracy.Error, bound: accuracy.Error) -> None:
    row |= {"error": error.output, "log_error": error.log_sum, "bound": bound.output, "log_bound": bound.log_sum}
    if not error.within(bound):
        row |= {
            "status": "wrong",
            "reason": f"error {error.output:.2g}, {error.log_sum:.2g}; at most {bound.output:.2g}, {bound.log_sum:.2g}",
        }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def measure(settings: Settings, say: Callable[[str], None], known: Sequence[Row] | None = None) -> Iterator[list[Row]]:
    """The rows of one context after the other.

    Args:
      say: told what is being done.
      known: what `check` found before; None to check now. Storages that are not right are not timed.
    """
    start = time.monotonic()
    names = tuple(dict.fromkeys((BASE, *settings.storages)))
    found = list(check(dataclasses.replace(settings, storages=names))) if known is None else list(known)
    refused = [row for row in found if row["status"] != "ok"]
    names = tuple(n for n in names if n not in {row["storage"] for row in refused})
    yield refused
    ceilings = timing.ceilings(device.ceiling_bytes())
    late = lambda: settings.seconds is not None and time.monotonic() - start > settings.seconds  # noqa: E731
    for context in settings.contexts:
        for group in _groups(names, settings, context):
            if late():
                why = f"after {settings.seconds:.0f} s"
                yield [{"storage": n, "context": context, "status": "left out", "reason": why} for n in group]
                continue
            yield list(_context(group, settings, context, ceilings, say))


def _context(names, settings, context, ceilings, say) -> Iterator[Row]:
    """All candidates of one context, made one after the other and then timed in turn."""
    rows: dict[str, Row] = {}
    ready: dict[str, Candidate] = dict(ceilings)
    for name, make in _makers(names, settings, context):
        began = time.monotonic()
        row, candidate = _attempt(name, settings, make)
        rows[name] = row
        if row["status"] == "ok":
            ready[name] = candidate
        say(f"{context:,} tokens, {name}: {row['status']}, made in {time.monotonic() - began:.1f} s")
    if not any(name in ready for name in rows):
        yield from ({"context": context, **row} for row in rows.values())
        return
    q = jnp.asarray(specs.query(settings.shape(context), np.random.default_rng(0)))
    ready["step"] = timing.empty_steps(q, 256)
    timed = timing.interleave(ready, settings.rounds)
    facts = {
        "context": context, "batch": settings.batch, "heads": settings.heads, "group": settings.group,
        "channels": settings.channels, "block": settings.block, "empty_step_us": 1e6 * timed["step"].median,
    } | {f"{name}_gb_per_s": ceilings[name].nbytes / timed[name].median / 1e9 for name in ceilings}  # fmt: skip
    for name, row in rows.items():
        if name in ready:
            row |= _figures(name, ready, timed, facts["read_gb_per_s"], [n for n in rows if n in ready])
        yield facts | row


def _figures(name: str, ready: dict[str, Candidate], timed: dict[str, timing.Timed], read: float, others) -> Row:
    time_s, rate = timed[name].median, ready[name].nbytes / timed[name].median / 1e9
    rivals_of = {n: timed[n].median / time_s for n in others if n not in specs.TIMED or n == BASE}
    return {
        "us": 1e6 * time_s,
        "spread": timed[name].spread,
        "quartiles_us": [1e6 * x for x in timed[name].quartiles],
        "steps_per_call": ready[name].steps,
        "total_bytes": ready[name].nbytes,
        "gb_per_s": rate,
        "share_of_read": rate / read,
        "speedup": rivals_of,
    }


def _makers(names: Sequence[str], s: Settings, context: int) -> Iterator[tuple[str, Callable[[Row], Candidate]]]:
    programs = _together({name: functools.partial(_compile, name, s, context) for name in names})
    for name in names:
        yield name, functools.partial(_storage, name, s, context, programs.pop(name))
    for name, make in rivals.candidates(s.shape(context), context, s.layers):

        def rival(row: Row, make=make) -> Candidate:
            row["implementation"] = "rival"
            return make()

        yield name, rival


class _Program(NamedTuple):
    """What is compiled for a storage.

    Attributes:
      fill: as of `filler`.
      run: the loop, called with `q, k, v, first, last`.
      shape, steps: of the storage, and of the loop.
    """

    fill: Callable[[], tuple[Format, Format, list[tuple[Format, Format]]]]
    run: Callable[..., Partial]
    shape: specs.Shape
    steps: int


def _compile(name: str, s: Settings, context: int) -> _Program:
    kinds, one = specs.TIMED[name], _layer_bytes(name, s, context)
    layers = s.layers or max(1, -(-device.rotation_bytes() // one))
    steps = max(layers, min(512, -(-device.call_bytes() // one)))
    shape = s.stored(name, context, layers)
    fill = filler(kinds, shape, context, (steps - 1) % layers, s)
    k, v, cuts = jax.eval_shape(fill)
    api.check(k, v, s.group, s.implementation, s.chip, kinds.pre_rope)
    q = jax.ShapeDtypeStruct((s.batch, s.heads, s.group, s.channels), jnp.float32)
    rows = jax.ShapeDtypeStruct((s.batch,), jnp.int32)
    run = jax.jit(functools.partial(loop, kinds, shape, context, steps, s.implementation, s.chip))
    accuracy.prepare(q, cuts[0][0], cuts[0][1], kinds.pre_rope)
    return _Program(jax.jit(fill).lower().compile(), run.lower(q, k, v, rows, rows).compile(), shape, steps)


def filler(kinds: specs.Storage, shape: specs.Shape, context: int, checked: int, s: Settings) -> Callable[[], Any]:
    """What makes k, v, and for each window of `accuracy.windows` the blocks that layer `checked` is compared in.

    Those have heads apart, whatever k and v have: the comparison finds what joining them does wrong, too.
    """

    def fill():
        k, v = (contents.fill(kind, shape, seed) for seed, kind in enumerate((kinds.keys, kinds.values)))
        places = [accuracy.blocks_of(window, shape) for window in accuracy.windows(context)]
        cuts = [tuple(contents.cut(x, checked, *place) for x in (k, v)) for place in places]
        k, v = heads.join_formats(k, v, s.joined, kinds.pre_rope)
        return *contents.in_runs(k, v, s.group, s.implementation, s.chip), cuts

    return fill


def _together(programs: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Compiles all at a time before anything runs, but on a CPU: a kernel takes seconds, and a lent machine is dear."""
    if jax.default_backend() == "cpu":
        return programs
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = {name: pool.submit(program) for name, program in programs.items()}

    def result(name: str) -> Any:
        # What went wrong is tried again alone, in case that it was the company.
        return programs[name]() if futures[name].exception() else futures[name].result()

    return {name: functools.partial(result, name) for name in programs}


def _storage(name: str, s: Settings, context: int, program: Callable[[], _Program], row: Row) -> Candidate:
    """Fills a storage and checks the compiled loop's answer at both ends of the context."""
    kinds = specs.TIMED[name]
    fill, run, shape, steps = program()
    k, v, cuts = fill()
    q = jnp.asarray(specs.query(shape, np.random.default_rng(0)))
    errors, rows = [], np.ones(s.batch, np.int32)
    for window, cut in zip(accuracy.windows(context), cuts):
        got = run(q, k, v, *(jnp.asarray(rows * x) for x in window))
        position, start = context if kinds.pre_rope else None, accuracy.blocks_of(window, shape)[0]
        errors.append(accuracy.compare_window(got, q, *cut, window, start, position))
    parts = contents.bytes_by_part(k, v, q, got)
    row |= {"keys": describe(k), "values": describe(v), "layers": shape.layers, "block": shape.tokens, "bytes": parts}
    _judge(row, *(accuracy.worst(list(side)) for side in zip(*errors)))
    first, last = jnp.asarray(rows * 0), jnp.asarray(rows * context)
    return Candidate(lambda: jax.block_until_ready(run(q, k, v, first, last)), steps, sum(parts.values()))


def loop(
    kinds: specs.Storage, shape: specs.Shape, context: int, steps: int, implementation: Any, chip: str, q: jax.Array,
    k: Format, v: Format, first: jax.Array, last: jax.Array,
) -> Partial:  # fmt: skip
    """`steps` steps, each on the next layer; the answer of the last one."""
    rotation = contents.rotation(shape.channels, np.full(shape.batch, context, np.int32)) if kinds.pre_rope else None

    def body(i, before: Partial) -> Partial:
        return api.decode_attention(
            timing.chained(q, before.acc), k, v, layer=i % jnp.int32(shape.layers), first=first, last=last,
            rotation=rotation, implementation=implementation, chip=chip,
        )  # fmt: skip

    return jax.lax.fori_loop(0, steps, body, Partial(q, q[..., 0], q[..., 0]))


@functools.cache
def _layer_bytes(name: str, s: Settings, context: int) -> int:
    """Bytes of keys and values of a layer, from the smallest storage of the kind."""
    rng, kinds, shape = np.random.default_rng(0), specs.TIMED[name], s.stored(name, context)
    few = dataclasses.replace(shape, batch=1, blocks=1)
    leaves = jax.tree.leaves([specs.make(kind, few, rng) for kind in (kinds.keys, kinds.values)])
    return sum(x.nbytes for x in leaves) * s.batch * shape.blocks


def _groups(names: tuple[str, ...], s: Settings, context: int) -> list[tuple[str, ...]]:
    """Storages that fit the memory together, each group with the base."""
    size = {n: max(device.rotation_bytes(), _layer_bytes(n, s, context)) for n in names}
    free = 0.8 * device.memory_bytes() - 3 * device.ceiling_bytes() - 2 * size.get(BASE, 0)
    groups: list[list[str]] = [[]]
    for name in names:
        if name != BASE:
            if groups[-1] and sum(size[n] for n in (*groups[-1], name)) > free:
                groups.append([])
            groups[-1].append(name)
    base = (BASE,) if BASE in names else ()
    return [(*base, *group) for group in groups]
