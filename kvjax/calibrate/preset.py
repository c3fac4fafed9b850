"""Calibration of a preset for a model, from text to file and back."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import __version__
from kvjax.calibrate import artefact
from kvjax.calibrate.artefact import Meta, TensorMeta
from kvjax.calibrate.collect import collect
from kvjax.calibrate.fit import Stats, fit_tables, sensitivity_error
from kvjax.calibrate.text import self_sampled_tokens, tokens_from_file
from kvjax.codecs.kvquant import NUQChannelCodec, NUQTokenCodec
from kvjax.model.llama import LoadedModel
from kvjax.policy import Preset

# arXiv 2401.18079, Section 4: 16 sequences of 2048 tokens.
SAMPLES, LENGTH = 16, 2048


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A preset's fitted constants.

    Attributes:
      tables: as from `fit_tables`, keys and values each for their own codec.
      meta: what they were fitted for.
      stats: of keys and of values, for reports; None where the constants come from a file.
    """

    tables: dict[str, dict[str, np.ndarray]]
    meta: Meta
    stats: dict[str, Stats] | None = None

    @property
    def params(self) -> tuple[dict, dict]:
        """`(k_params, v_params)` for `kvjax.policy.bind`, leaves `[L, ...]` float32."""
        keys, values = ({name: jnp.asarray(a) for name, a in self.tables[t].items()} for t in ("keys", "values"))
        return keys, values

    def report(self) -> list[dict[str, Any]]:
        """One row per layer and tensor; empty without statistics.

        `outliers` and `dropped` are fractions of all elements: those in slots, and those outside the range that found
        no slot. `error_vs_uniform` is the sensitivity-weighted squared error (Eq. 1) of the rest, relative to that of
        uniform levels in the same ranges.
        """
        rows = []
        for tensor, settings in self.meta.coded().items():
            if self.stats is None:
                continue
            stats = self.stats[tensor]
            measured = getattr(stats, tensor)
            uniform = fit_tables(stats, settings.bits, "uniform")[tensor]["levels"]
            error = sensitivity_error(measured, self.tables[tensor]["levels"])
            ratio = error / np.maximum(sensitivity_error(measured, uniform), 1e-300)
            rows += [
                {
                    "layer": layer,
                    "tensor": tensor,
                    "outliers": float(measured.in_slots[layer] / measured.elements),
                    "dropped": float(measured.dropped[layer] / measured.elements),
                    "error_vs_uniform": float(ratio[layer]),
                }
                for layer in range(self.meta.layers)
            ]
        return sorted(rows, key=lambda row: row["layer"])


def calibrate(
    model: LoadedModel,
    name: str,
    preset: Preset,
    *,
    text: Any = None,
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
    batch: int = 1,
    progress: bool = True,
) -> Calibration:
    """Fits the constants of preset `name` for `model`.

    Args:
      text: a UTF-8 text file; None: the model writes its own text.
      samples, length: sequences and their tokens; None: 2048, or the model's context where that is shorter.
      seed: of the windows or of the sampled text.
      batch: sequences at a time; more need more memory and give the same result.

    Raises:
      ValueError, OSError: one line, for a preset that needs no calibration, or text that does not do.
    """
    codecs = _codecs(name, preset)
    length = min(LENGTH, model.config.max_positions) if length is None else length
    if samples < 1:
        raise ValueError(f"`samples={samples}` must be at least 1.")
    if not preset.sinks + 1 < length <= model.config.max_positions:
        raise ValueError(
            f"`length={length}` must be more than {preset.sinks + 1} tokens and at most the model's context of "
            f"{model.config.max_positions}."
        )
    if text is None:
        tokens, source = self_sampled_tokens(model, samples, length, seed, progress=progress)
    else:
        tokens, source = tokens_from_file(model, text, samples, length, seed)
    collected = collect(
        model,
        tokens,
        outlier_fractions=tuple(codec.outliers for codec in codecs.values()),
        sinks=preset.sinks,
        pre_rope=preset.keys.pre_rope,
        batch=batch,
        progress=progress,
    )
    return fit(model, name, preset, collected, source)


def fit(model: LoadedModel, name: str, preset: Preset, collected: dict[float, Stats], source: str) -> Calibration:
    """The constants of a preset from the statistics of one `collect` with its sinks, fractions and kind of keys."""
    settings = _settings(model, name, preset)
    stats = {tensor: collected[asked.outliers] for tensor, asked in settings.items()}
    tables = {t: fit_tables(stats[t], asked.bits, asked.table, qnorm=True)[t] for t, asked in settings.items()}
    meta = Meta(
        preset=name,
        keys=settings["keys"],
        values=settings["values"],
        sinks=preset.sinks,
        qnorm=True,  # always: the codec chooses between the two tables
        **artefact.model_facts(model),
        source=source,
        tokens=stats["keys"].tokens,
        kvjax=__version__,
    )
    return Calibration(tables, meta, stats)


def save(path, calibration: Calibration) -> None:
    """Writes a calibration file."""
    artefact.save(path, calibration.tables, calibration.meta)


def load(path, model: LoadedModel, name: str, preset: Preset) -> Calibration:
    """Reads a calibration file for preset `name` of `model`; an error in one line where it was made for another."""
    wanted = artefact.model_facts(model) | {"sinks": preset.sinks, "qnorm": True}
    for tensor, settings in _settings(model, name, preset).items():
        wanted |= {f"{tensor}.{field}": value for field, value in vars(settings).items()}
    source = model.path or "M"
    way_out = f"recalibrate with scripts/calibrate.py --model {source} --quant {name} --out {path}"
    tables, meta = artefact.load(path, wanted, way_out)
    return Calibration(tables, meta)


def _settings(model: LoadedModel, name: str, preset: Preset) -> dict[str, TensorMeta]:
    return {
        tensor: TensorMeta(
            bits=codec.bits,
            table=preset.weights if codec.table == "fitted" else codec.table,
            outliers=float(codec.outliers),
            slots=codec.slots(model.config.head_dim),
            pre_rope=codec.pre_rope,
        )
        for tensor, codec in _codecs(name, preset).items()
    }


def _codecs(name: str, preset: Preset) -> dict[str, NUQChannelCodec | NUQTokenCodec]:
    """The codecs of keys and values, which are of the kinds that calibration knows."""
    if preset.budget is not None:
        raise ValueError(f"`quant={name}` has bits to be allocated, not constants: use scripts/allocate.py auto.")
    if not preset.needs_params:
        raise ValueError(f"`quant={name}` needs no calibration: use it as it is.")
    if not (isinstance(preset.keys, NUQChannelCodec) and isinstance(preset.values, NUQTokenCodec)):
        raise ValueError(
            f"`quant={name}` cannot be calibrated: it stores {preset.keys.describe()} keys and "
            f"{preset.values.describe()} values; calibration fits per-channel nuq keys and per-token nuq values."
        )
    return {"keys": preset.keys, "values": preset.values}
