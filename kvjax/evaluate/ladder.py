"""KVQuant's ablation, step by step: what each of its parts is worth on a model and a text.

After Tables 9 to 14 of arXiv 2401.18079, by the same codecs and protocol ("all") as everything else here. Every step is
an ad-hoc policy, and all are fitted on one calibration text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.collect import collect
from kvjax.calibrate.fit import Stats, fit_tables
from kvjax.codecs import NUQChannelCodec, NUQTokenCodec
from kvjax.codecs.base import AbstractCodec
from kvjax.evaluate.perplexity import REFERENCE, Candidate, Result, perplexity, reference_policy
from kvjax.model.llama import LoadedModel
from kvjax.policy import Preset, bind
from kvjax.presets import kvquant, per_token


@dataclasses.dataclass(frozen=True)
class Step:
    """One row of the ladder.

    Attributes:
      name: what this step does.
      preset: codecs, sinks and the k-means weights.
      against: the step that it changes, which its difference in perplexity is taken to.
      outside: share of each key channel that calibration leaves outside its range; None: the share that has slots.
      whole_window: the block of codecs with statistics over a block is the window ("online" ranges).
    """

    name: str
    preset: Preset
    against: str
    outside: float | None = None
    whole_window: bool = False

    @property
    def fraction(self) -> float:
        return getattr(self.preset.keys, "outliers", 0.0) if self.outside is None else self.outside


@dataclasses.dataclass(frozen=True)
class Row:
    """A step with what it measured; `delta` is its perplexity less that of the step it changes, if that was run."""

    result: Result
    against: str | None
    delta: float | None

    def to_json(self) -> dict[str, Any]:
        return self.result.to_json() | {"against": self.against, "delta": self.delta}


def steps(bits: int) -> list[Step]:
    """The ladder at `bits` bits, its side rows, and the finished method at all three widths."""
    tokens = NUQTokenCodec(bits=bits, table="uniform")
    nuq_values = NUQTokenCodec(bits=bits)

    def channels(
        table: Literal["fitted", "uniform", "nf"] = "fitted", pre_rope: bool = True, **settings: Any
    ) -> NUQChannelCodec:
        return NUQChannelCodec(bits=bits, table=table, pre_rope=pre_rope, **settings)

    def nuq(weights: str) -> Preset:
        return Preset(channels(), nuq_values, weights=weights)

    full, dense = kvquant(bits), kvquant(bits, outliers=0)
    online = channels(ranges="block")
    by_channel = NUQChannelCodec(bits=bits, table="uniform", ranges="block")
    token, channel, pre_rope = f"int{bits} per token", "K per channel", "K before RoPE"
    fisher, fisher_s2 = f"nuq{bits}, Fisher", f"nuq{bits}, Fisher * s^2"
    dense_name, full_name = f"1 exact sink (kvquant{bits}-dense)", f"1 % outliers (kvquant{bits})"
    ladder = [
        Step(token, per_token(bits, "uniform"), REFERENCE),
        Step(channel, Preset(channels("uniform", pre_rope=False), tokens), token),
        Step(pre_rope, Preset(channels("uniform"), tokens), channel),
        Step(f"nf{bits} instead of int{bits}", Preset(channels("nf"), NUQTokenCodec(bits=bits, table="nf")), pre_rope),
        Step(f"nuq{bits}, plain k-means", nuq("none"), pre_rope),
        Step(fisher, nuq("fisher"), pre_rope),
        Step(fisher_s2, nuq("fisher*s2"), fisher),
        Step(dense_name, dense, fisher_s2),
        Step(full_name, full, dense_name),
    ]
    aside = [
        Step("V per channel too (window ranges)", Preset(ladder[1].preset.keys, by_channel), channel, None, True),
        Step("dense, K ranges of the window", dataclasses.replace(dense, keys=online), dense_name, 0.0, True),
        Step("dense, Q-Norm", kvquant(bits, outliers=0, q_norm=True), dense_name),
        Step("K outliers uncapped", dataclasses.replace(full, keys=channels(outliers=1.0)), full_name, 0.01),
        Step(
            "1 % outliers, K ranges of the window",
            dataclasses.replace(full, keys=dataclasses.replace(online, outliers=0.01)), full_name, None, True,
        ),
        Step("1 % outliers, Q-Norm", kvquant(bits, q_norm=True), full_name),
        Step("1 % outliers, no sink", dataclasses.replace(full, sinks=0), full_name),
    ]  # fmt: skip
    finished = [
        Step(f"kvquant{b}{suffix}", kvquant(b, outliers), REFERENCE)
        for b in (4, 3, 2)
        for suffix, outliers in (("", 0.01), ("-dense", 0.0))
        if b != bits
    ]
    return ladder + aside + finished


def ladder(
    model: LoadedModel,
    windows: np.ndarray,
    calibration: np.ndarray,
    rungs: Sequence[Step],
    *,
    batch: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Evaluates the steps on windows of text by protocol "all"; the uncompressed reference comes first.

    Args:
      windows: `[n, L]` tokens to evaluate on.
      calibration: `[m, S]` tokens that ranges and tables are fitted on.
      rungs: from `steps`.
      batch: windows at a time; None for what fits comfortably.
    """
    stats = _collect(model, calibration, rungs, progress)
    candidates = [Candidate(reference_policy(model))]
    candidates += [_candidate(model, step, stats, windows.shape[1]) for step in rungs]
    results = perplexity(model, candidates, windows, batch=batch, progress=progress)
    by_name = {result.quant: result for result in results}
    rows = [Row(results[0], None, None)]
    for step, result in zip(rungs, results[1:]):
        other = by_name.get(step.against)
        rows.append(Row(result, step.against, None if other is None else result.perplexity - other.perplexity))
    return rows


def _key(step: Step) -> tuple[bool, int]:
    """What one calibration run settles: keys before RoPE or after, and the sinks left out."""
    return step.preset.keys.pre_rope, step.preset.sinks


def _collect(
    model: LoadedModel, tokens: np.ndarray, rungs: Sequence[Step], progress: bool
) -> dict[tuple[bool, int], dict[float, Stats]]:
    wanted: dict[tuple[bool, int], list[float]] = {}
    for step in rungs:
        if step.preset.needs_params:
            wanted.setdefault(_key(step), []).append(step.fraction)
    return {
        key: collect(
            model,
            tokens,
            outlier_fractions=tuple(sorted(set(fractions))),
            pre_rope=key[0],
            sinks=key[1],
            progress=progress,
        )
        for key, fractions in wanted.items()
    }


def _candidate(model: LoadedModel, step: Step, stats: dict, length: int) -> Candidate:
    preset = step.preset
    params: dict[str, Any] = {"keys": None, "values": None}
    if preset.needs_params:
        tables = fit_tables(stats[_key(step)][step.fraction], preset.keys.bits, preset.weights, qnorm=True)  # type: ignore[attr-defined]
        params = {name: _for_codec(getattr(preset, name), tables[name]) for name in params}
    policy = bind(step.name, preset, model.config.layers, params["keys"], params["values"])
    # Packing wants whole words; one token more in the last block than the window has is a copy of the last.
    return Candidate(policy, -(-(length - preset.sinks) // 32) * 32 if step.whole_window else 128)


def _for_codec(codec: AbstractCodec, table: dict[str, np.ndarray]) -> Any:
    return jax.tree.map(jnp.asarray, table) if codec.needs_params else None
