"""A training run from beginning to end: begin or resume, step, log, checkpoint, export, report.

A run's folder holds `run.json` (recipe and digests of its data), `log.jsonl` (one line per step), `checkpoints/`,
`cache/` (tokens) and, at the end, `model/` (Hugging Face layout) and `report.json`.
"""

import contextlib
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax.model.llama import LoadedModel
from kvjax.model.weights import save
from kvjax.train import recipe as recipes
from kvjax.train.checkpoints import Place, check_identity, open_checkpoints, write_json
from kvjax.train.data import Corpus, Passages, fingerprint
from kvjax.train.display import Display, Log
from kvjax.train.recipe import Recipe
from kvjax.train.report import report
from kvjax.train.step import Batch, Step, TrainState, data_mesh, initial_model, initial_state, make_step, place
from kvjax.train.tasks import TASKS, Source, draw_batch


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is run; none of it changes a loss.

    Attributes:
      resume: go on from the folder's newest checkpoint.
      minutes: scale the recipe's tokens so that it takes about this long on this machine; None: as it stands.
      checkpoint_every: steps between checkpoints; one more is written at the end.
      devices: to train on, all by default.
      recall_lengths: prompt lengths of the report's pass-key test.
      recall_trials: prompts per length.
    """

    resume: bool = False
    minutes: float | None = None
    checkpoint_every: int = 100
    devices: Sequence[jax.Device] | None = None
    recall_lengths: tuple[int, ...] = (256, 512, 1024)
    recall_trials: int = 50


class Interrupted(Exception):
    """The user stopped the run; it was saved."""


def train(recipe: Recipe, corpus: Corpus, out: Path, options: Options = Options()) -> dict[str, Any]:
    """Trains a model, writes it to `out/model` and says what it reaches.

    The same recipe, corpus and number of devices give the same losses, whether the run is cut off and resumed or not.

    Returns:
      The report, as `out/report.json` has it.

    Raises:
      ValueError: corpus too short, batch not divisible by the devices, resuming what is not the same run.
      Interrupted: on Ctrl-C, after saving.
      FloatingPointError: the loss is no longer finite.
    """
    mesh = data_mesh(options.devices)
    _check(recipe, corpus, mesh)
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "minutes": options.minutes,
        "corpus": fingerprint(corpus.train),
        "tokenizer": hashlib.sha256(corpus.tokenizer.to_str().encode()).hexdigest()[:16],
    }
    run = check_identity(out / "run.json", identity, options.resume)
    model = initial_model(recipe)
    step = make_step(recipe, mesh)
    if "trained_recipe" not in run:
        fitted = _fit(recipe, step, model, mesh, options.minutes) if options.minutes else recipe
        run = {**run, "trained_recipe": dataclasses.asdict(fitted)}
        write_json(out / "run.json", run)
    recipe = recipes.from_table(run["trained_recipe"])

    with open_checkpoints(out / "checkpoints") as checkpoints:
        state = initial_state(model, recipe, mesh)
        start, state = checkpoints.restore(state) or (Place(), state)
        log = Log(out / "log.jsonl", first=start.step)
        try:
            with Display(recipe.steps, start.step) as display:
                end, state = _steps(recipe, corpus, step, mesh, start, state, checkpoints, log, display, options)
        finally:
            log.close()
    trained = model.with_state(jax.device_get(state.params))
    _export(trained, corpus, out / "model")
    found = {
        **report(trained, corpus, options.recall_lengths, options.recall_trials),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step,
        "seconds": round(end.seconds, 1),
        "tokens_per_s": round(recipe.steps * recipe.tokens_per_step / max(end.seconds, 1e-9), 1),
        "seed": recipe.seed,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }
    write_json(out / "report.json", found)
    return found


def _check(recipe: Recipe, corpus: Corpus, mesh: Mesh) -> None:
    longest = max(window for phase in recipe.phases for window in phase.windows)
    if len(corpus.train) <= longest:
        raise ValueError(
            f"The corpus has {len(corpus.train)} tokens, and the recipe's windows need more than {longest}; "
            f"give a longer text or --set shorter windows."
        )
    for phase in recipe.phases:
        for window in phase.windows:
            if (recipe.tokens_per_step // window) % mesh.size:
                raise ValueError(
                    f"`tokens_per_step={recipe.tokens_per_step}` makes {recipe.tokens_per_step // window} windows of "
                    f"{window}, which {mesh.size} devices cannot share evenly; change it or give --devices."
                )


def _steps(
    recipe: Recipe, corpus: Corpus, step: Step, mesh: Mesh, start: Place, state: TrainState,
    checkpoints, log: Log, display: Display, options: Options,
) -> tuple[Place, TrainState]:  # fmt: skip
    """All steps from `start` on."""
    passages = Passages(corpus.train, recipe.seed)
    passages.position = start.position
    here, begun = start, time.monotonic()
    batch = _draw(recipe, corpus, passages, start.step)
    with _stop_requests() as stopped:
        for index in range(start.step, recipe.steps):
            rate = recipe.learning_rate(index)
            position = passages.position
            state, metrics = step(state, np.float32(rate), *place(batch, mesh))
            batch = _draw(recipe, corpus, passages, index + 1)  # while the devices work
            metrics = jax.device_get(metrics)
            here = Place(index + 1, position, start.seconds + time.monotonic() - begun)
            entry = _entry(recipe, index, rate, metrics, here.seconds)
            if not math.isfinite(entry["loss"]):
                raise FloatingPointError(f"The loss is {entry['loss']} at step {index}; lower the learning rate.")
            log.write(entry)
            display.update(entry)
            if stopped() or here.step % options.checkpoint_every == 0 or here.step == recipe.steps:
                checkpoints.save(here, state)
            if stopped() and here.step < recipe.steps:
                raise Interrupted(f"Stopped after step {here.step} of {recipe.steps}; give --resume to go on.")
    return here, state


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into an answer to `stopped()`, so that a step is finished and saved.

    The second one acts as usual. Outside the main thread, where Python allows no handlers, none is set.
    """
    requests: list[int] = []
    usual: dict[int, Any] = {}

    def note(number, frame):
        requests.append(number)
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():
        for request in (signal.SIGINT, signal.SIGTERM):
            usual[request] = signal.signal(request, note)
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _draw(recipe: Recipe, corpus: Corpus, passages: Passages, index: int) -> Batch:
    """The batch of a step, a function of recipe, corpus, step and position; behind the end, that of the last step."""
    index = min(index, recipe.steps - 1)
    phase, window = recipe.locate(index)[0], recipe.window(index)
    source = Source(passages, corpus.tokenizer, recipe.model.vocab, phase.facts)
    rng = np.random.default_rng([recipe.seed, 1, index])
    rows = recipe.tokens_per_step // window
    tokens, weights, tasks = draw_batch(source, rng, phase.mix, rows, window + 1)
    return Batch(tokens, weights[:, 1:], tasks)


def _entry(recipe: Recipe, index: int, rate: float, metrics: dict, seconds: float) -> dict[str, Any]:
    """One line of the log. `losses` has the mean loss of each task in the batch, in nats per token."""
    losses = {
        name: round(float(total / weight), 6)
        for name, total, weight in zip(TASKS, metrics["task_loss"], metrics["task_weight"])
        if weight
    }
    return {
        "step": index,
        "tokens": (index + 1) * recipe.tokens_per_step,
        "phase": recipe.locate(index)[0].name,
        "window": recipe.window(index),
        "loss": float(metrics["loss"]),
        "losses": losses,
        "learning_rate": rate,
        "gradient_norm": round(float(metrics["gradient_norm"]), 6),
        "seconds": round(seconds, 3),
    }


def _fit(recipe: Recipe, step: Step, model: LoadedModel, mesh: Mesh, minutes: float) -> Recipe:
    """Scales a recipe to take about `minutes`: each window length is compiled and timed, on weights thrown away.

    The time spent here counts, and a tenth is left for what comes after the last step.
    """
    begun, seconds = time.monotonic(), {}
    state = initial_state(model, recipe, mesh)
    for window in sorted({window for phase in recipe.phases for window in phase.windows}):
        rows = recipe.tokens_per_step // window
        tokens = np.random.default_rng(0).integers(2, recipe.model.vocab, (rows, window + 1)).astype(np.int32)
        batch = Batch(tokens, np.ones((rows, window), np.float32), np.zeros(rows, np.int32))
        for _ in range(3):  # the first compiles
            since = time.monotonic()
            state, metrics = step(state, np.float32(0), *place(batch, mesh))
            jax.block_until_ready(metrics)
            seconds[window] = time.monotonic() - since
    whole = sum(
        steps * sum(seconds[w] for w in phase.windows) / len(phase.windows)
        for phase, steps in zip(recipe.phases, recipe.phase_steps)
    )
    left = 0.9 * minutes * 60 - (time.monotonic() - begun)
    if left <= 0:
        raise ValueError(f"`minutes={minutes}` is less than compiling takes; give more.")
    return recipe.scaled(left / whole)


def _export(model: LoadedModel, corpus: Corpus, folder: Path) -> None:
    """The model as transformers and `kvjax.load` read it: bfloat16 weights, config and tokenizer."""
    save(model, folder, "bfloat16")
    corpus.tokenizer.save(str(folder / "tokenizer.json"))
