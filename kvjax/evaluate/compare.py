"""All presets by all measures in one run that can be stopped and resumed.

The work is cut into units: a preset by one protocol of perplexity, or by passkey at one length. Each finished unit is
appended to a journal under a key that hashes whatever determines its result, so that a second run skips what the first
has finished and never mixes results of different settings.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax import __version__
from kvjax.evaluate import passkey
from kvjax.evaluate.journal import Journal
from kvjax.evaluate.perplexity import REFERENCE, Evaluation, path_of
from kvjax.evaluate.progress import Units
from kvjax.model.llama import LoadedModel
from kvjax.policy import Policy, preset
from kvjax.presets import PRESETS, is_file

PASSKEY = "passkey"
# The reference's logits on the host, of each protocol: 64 windows of 1024 tokens with a vocabulary of 4096.
_KEEP_BYTES = 1 << 30
# What a preset may fail with on its own account; the run goes on with the next one.
_REFUSALS = (ValueError, NotImplementedError, OSError)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is measured of every preset, and on what.

    Attributes:
      model: from `kvjax.load`.
      windows: `[n, L]` tokens for each protocol, "all" and "decode"; a protocol that is absent is not run.
      prefill: of protocol "decode"; None for half of the window.
      batch: windows at a time; no result depends on it.
      lengths: tokens of the passkey prompts; none: no passkey.
      haystack, depths, trials, seed: as in `kvjax.evaluate.passkey.passkey`.
    """

    model: LoadedModel
    windows: dict[Any, np.ndarray]
    prefill: int | None = None
    batch: int | None = None
    lengths: tuple[int, ...] = ()
    haystack: np.ndarray | None = None
    depths: int = 10
    trials: int = 5
    seed: int = 0

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """What determines results besides the method and the part: all but speed and batches."""
        return {
            "kvjax": __version__, "model": self.model.fingerprint, "dtype": str(self.model.dtype),
            "platform": jax.default_backend(),
        }  # fmt: skip

    @functools.cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        """By protocol; the reference that they hold is compiled once and serves all presets."""
        return {
            protocol: Evaluation(
                self.model, windows, protocol=protocol, prefill=self.prefill if protocol == "decode" else None,
                batch=self.batch, keep_bytes=_KEEP_BYTES,
            )
            for protocol, windows in self.windows.items()
        }  # fmt: skip

    @functools.cached_property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The units of a preset ("all", "decode", "passkey 256"), each with what determines its result.

        Texts count by the tokens that were made of them, so that the tokenizer counts too.
        """
        out: dict[str, dict[str, Any]] = {}
        for protocol, evaluation in self.evaluations.items():
            windows, context = evaluation.windows.shape
            out[protocol] = {"windows": windows, "context": context, "tokens": _sha(evaluation.windows)}
            if protocol == "decode":
                out[protocol]["prefill"] = evaluation.first - 1
        if self.lengths:
            tasks = passkey.tasks_of(self.model, self.haystack, self.lengths, self.depths, self.trials, self.seed)
            for length, prompts in tasks.items():
                out[f"{PASSKEY} {length}"] = {
                    "length": length, "depths": self.depths, "trials": self.trials, "seed": self.seed,
                    "tokens": _sha(np.stack([p.tokens for p in prompts])),
                    "keys": _sha(np.array([int(p.key) for p in prompts])),
                }  # fmt: skip
        if not out:
            raise ValueError("`protocols` and `lengths` are both empty: there is nothing to measure.")
        return out


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run knows at its end.

    Attributes:
      records: finished units by preset and part; `record["result"]` is what was measured.
      errors: presets that failed, and with what.
      skipped: units that an earlier run had finished.
      others: results in the journal that belong to other settings or presets, and are left alone.
    """

    records: dict[tuple[str, str], dict[str, Any]]
    errors: dict[str, str]
    skipped: int
    others: int


def default_presets() -> list[str]:
    """All built-in presets but those with Q-Norm, the uncompressed ones first."""
    names = [name for name in PRESETS if "qnorm" not in name]
    return sorted(names, key=lambda name: family(name) != "uncompressed")


def family(name: str) -> str:
    """The method a preset's name belongs to: its letters up to the first number, or the file that defines it."""
    if is_file(name):
        return Path(name).stem
    if ":" in name:
        return "pair"
    letters = name[: next((i for i, c in enumerate(name) if not c.isalpha()), len(name))]
    return "uncompressed" if name in ("bf16", "f16", "f32") else letters or name


def compare(
    task: Task,
    names: Sequence[str],
    policy_of: Callable[[str], Policy],
    journal: Journal,
    *,
    calibration: str | None = None,
    progress: bool = True,
    on_start: Callable[[str], Any] | None = None,
) -> Outcome:
    """Measures presets, the bf16 reference first, and skips what the journal has already.

    Args:
      names: presets; all that is compared to bf16 needs it, so it is measured too.
      policy_of: fits a preset to the task's model. It is called for presets with work left, and where its result must
        be known to tell whether there is any; a ValueError, NotImplementedError or OSError of it or of a measurement
        is that preset's error, and the run goes on.
      calibration: names the text that `policy_of` fits on, where it does; then a preset with something to be fitted
        is known by it, and not fitted only to find that nothing is left to do.
      progress: show a bar on stderr.
      on_start: called with a line that says how much there is to do.
    """
    names = list(dict.fromkeys([REFERENCE, *names]))
    policies: dict[str, Policy] = {}
    errors: dict[str, str] = {}
    keys = _keys(task, names, policy_of, calibration, policies, errors)
    records = {unit: journal.records[key] for unit, (key, _) in keys.items() if key in journal.records}
    skipped, others = len(records), len(journal.records.keys() - {key for key, _ in keys.values()})
    left = [unit for unit in keys if unit not in records]
    if on_start:
        on_start(f"{len(left)} of {len(keys)} results to measure; {skipped} are finished")
    with Units(progress, len(keys), [(part, r["seconds"]) for (_, part), r in records.items()]) as shown:
        shown.plan([part for _, part in left])
        for name, part in left:
            with shown.unit(f"{name} {part}", part), _error_of(name, errors):
                if name not in policies:
                    if name in errors:
                        continue  # it cannot be fitted
                    with shown.paused():  # calibration has a bar of its own
                        policies[name] = policy_of(name)
                began = time.perf_counter()
                result, path = _measure(task, policies[name], part, shown.within)
                key, settings = keys[name, part]
                records[name, part] = {
                    "key": key, "quant": name, "part": part, "settings": settings, "result": result, "path": path,
                    "seconds": round(time.perf_counter() - began, 3),
                    "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }  # fmt: skip
            if (name, part) in records:  # outside: a full disk is no error of the preset's
                journal.append(records[name, part])
    return Outcome(records, errors, skipped, others)


def _keys(
    task: Task,
    names: Sequence[str],
    policy_of: Callable[[str], Policy],
    calibration: str | None,
    policies: dict[str, Policy],
    errors: dict[str, str],
) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """Every unit's key and settings; policies that had to be made for it, and presets that failed, are noted."""
    keys, parts = {}, task.parts
    for name in names:
        with _error_of(name, errors):
            chosen = preset(name)
            if calibration is not None and (chosen.needs_params or chosen.budget is not None):
                method = {"preset": repr(chosen), "calibration": calibration}
            else:
                policies[name] = policy_of(name)
                method = _method(policies[name])
            for part, settings in parts.items():
                everything = task.common | {"method": method, "part": part} | settings
                content = json.dumps(everything, sort_keys=True).encode()
                keys[name, part] = (hashlib.sha256(content).hexdigest()[:20], everything)
    return keys


def _measure(
    task: Task, policy: Policy, part: str, on_progress: Callable[[int, int], Any]
) -> tuple[dict[str, Any], list[str]]:
    """One unit: its result as JSON holds it, and the path it took."""
    if part in task.evaluations:
        evaluation = task.evaluations[part]
        result = evaluation.run([policy], progress=False, on_windows=on_progress)[-1]
        if not np.isfinite([result.perplexity, result.kl]).all():
            raise ValueError(f"by protocol {part} its perplexity is {result.perplexity} and its KL {result.kl}")
        return dataclasses.asdict(result), path_of(task.model, policy, evaluation.protocol).splitlines()
    results = passkey.passkey(
        task.model, [policy], task.haystack, lengths=[task.parts[part]["length"]], depths=task.depths,
        trials=task.trials, seed=task.seed, progress=False, on_prompts=on_progress,
    )  # fmt: skip
    cells = [{key: getattr(r, key) for key in ("length", "depth", "trials", "correct", "recall")} for r in results]
    path = path_of(task.model, policy, "decode")
    return {"bits_per_element": results[0].bits_per_element, "cells": cells}, path.splitlines()


def _method(policy: Policy) -> dict[str, Any]:
    """A policy by what it does: codecs and windows in words, fitted constants by their bytes; its name left out."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves([(segment.k_params, segment.v_params) for segment in policy.segments]):
        digest.update(_sha(np.asarray(leaf)).encode())
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.name not in ("name", "segments")}
    segments = [
        {f.name: repr(getattr(s, f.name)) for f in dataclasses.fields(s) if f.name not in ("k_params", "v_params")}
        for s in policy.segments
    ]
    return {name: repr(value) for name, value in fields.items()} | {"segments": segments, "fitted": digest.hexdigest()}


def _sha(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{content.dtype}{content.shape}".encode() + content.tobytes()).hexdigest()[:20]


@contextlib.contextmanager
def _error_of(name: str, errors: dict[str, str]) -> Iterator[None]:
    """Keeps a refusal as the preset's error, in one line."""
    try:
        yield
    except _REFUSALS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        errors[name] = message if errors.get(name, message) == message else f"{errors[name]}; {message}"
