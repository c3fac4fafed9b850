"""Policies: which codec pair each layer's cache uses, with what was fitted for it.

A `Preset` is a method's name made concrete but not yet bound to a model; `Policy` is a preset bound to a number of
layers and to fitted constants, ready for `kvjax.decode.init_cache`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.cache import CacheShape
from kvjax.codecs.base import AbstractCodec


@dataclasses.dataclass(frozen=True)
class Override:
    """Other codecs for some layers.

    Attributes:
      layers: of the model, from 0; negative ones count from the last.
      keys, values: None leaves what is there.
    """

    layers: tuple[int, ...]
    keys: AbstractCodec | None = None
    values: AbstractCodec | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method: codecs for keys and values, exact tokens at both ends, and how it is calibrated.

    Attributes:
      keys, values: the codecs of every layer that `overrides` does not name.
      sinks: the first tokens stay exact (KVQuant section 3.5).
      k_window, v_window: recent tokens that are seen exactly. Token-local codecs: the newest so many, the query's own
        included. Codecs over groups of tokens: all of a run of so many until it is full; 0 is a block.
      weights: of the k-means that fits tables: "fisher*s2" (arXiv 2401.18079, Eq. 7), "fisher" (the released code) or
        "none".
      overrides: applied in order.
      budget: true bits per element that `kvjax.calibrate.allocate` is to spend over the layers, instead of `overrides`.
      options: names of presets, among whose keys and values the budget is spent.
    """

    keys: AbstractCodec
    values: AbstractCodec
    sinks: int = 0
    k_window: int = 0
    v_window: int = 0
    weights: str = "fisher*s2"
    overrides: tuple[Override, ...] = ()
    budget: float | None = None
    options: tuple[str, ...] = ()

    def codecs(self, layers: int, name: str = "") -> list[tuple[AbstractCodec, AbstractCodec]]:
        """The codecs of keys and values of each of a model's `layers` layers; `name` is for the error."""
        pairs = [(self.keys, self.values)] * layers
        for override in self.overrides:
            for layer in override.layers:
                if not -layers <= layer < layers:
                    raise ValueError(
                        f"`quant={name}` sets layer {layer}, but the model has {layers} layers, 0 to {layers - 1}; "
                        "use one that sets no other."
                    )
                keys, values = pairs[layer]
                pairs[layer] = (override.keys or keys, override.values or values)
        return pairs

    @property
    def needs_params(self) -> bool:
        mine = (self.keys, self.values, *(c for o in self.overrides for c in (o.keys, o.values)))
        return any(codec is not None and codec.needs_params for codec in mine)

    @property
    def is_fitted(self) -> bool:
        """Whether `policy` finds something out for each model: constants, or bits by layer."""
        return self.budget is not None or self.needs_params


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentPolicy:
    """Layers with one codec pair; params leaves are `[len(layer_ids), ...]`, or None."""

    layer_ids: tuple[int, ...]
    k_codec: AbstractCodec
    v_codec: AbstractCodec
    k_params: Any = None
    v_params: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A preset bound to a model's layers.

    Attributes:
      name: for reports.
      segments: every layer is in one of them.
      sinks, k_window, v_window: as in `Preset`.
    """

    name: str
    segments: tuple[SegmentPolicy, ...]
    sinks: int = 0
    k_window: int = 0
    v_window: int = 0

    def check(self, shape: CacheShape) -> None:
        """Raises ValueError where the policy was made for a model of another shape."""
        layers = sum(len(segment.layer_ids) for segment in self.segments)
        if layers != shape.layers:
            raise ValueError(
                f"`policy` {self.name!r} covers {layers} layers, but the model has {shape.layers}; "
                "make it for this model."
            )
        for segment in self.segments:
            for codec, params in ((segment.k_codec, segment.k_params), (segment.v_codec, segment.v_params)):
                if codec.needs_params and params is None:
                    raise ValueError(
                        f"`policy` {self.name!r} is not calibrated; make it with kvjax.policy({self.name!r}, model)."
                    )
                scale = (params or {}).get("scale")
                if scale is not None and scale.shape[1:] != (shape.kv_heads, 1, shape.head_dim):
                    raise ValueError(
                        f"`policy` {self.name!r} is fitted to {scale.shape[1]} kv heads of size {scale.shape[3]}, "
                        f"but the model has {shape.kv_heads} of size {shape.head_dim}; calibrate it for this model."
                    )


# Consecutive layers of one codec pair make a segment where there are so few of them (AsymKV has at most three). Beyond,
# all layers of a pair make one: compile time follows the number of segments (`scripts/bench_compile.py`).
MAX_RUNS = 3


def bind(name: str, preset: Preset, layers: int, k_params: Any = None, v_params: Any = None) -> Policy:
    """A preset for `layers` layers.

    Args:
      k_params, v_params: fitted constants, leaves `[layers, ...]`, where its codecs need them: of the one codec that
        does, or a dict of codec to constants.
    """
    pairs = preset.codecs(layers, name)
    runs = [[0]] if layers else []
    for layer in range(1, layers):
        if pairs[layer] == pairs[layer - 1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    if len(runs) > MAX_RUNS:
        runs = [[i for i in range(layers) if pairs[i] == pair] for pair in dict.fromkeys(pairs)]

    def fitted(codec: AbstractCodec, params: Any, ids: list[int]) -> Any:
        if not codec.needs_params or params is None:
            return None
        if isinstance(next(iter(params)), AbstractCodec):
            params = params[codec]
        return jax.tree.map(
            lambda p: p[ids[0] : ids[-1] + 1] if len(ids) == ids[-1] - ids[0] + 1 else p[np.array(ids)], params
        )

    segments = []
    for ids in runs:
        keys, values = pairs[ids[0]]
        segments.append(
            SegmentPolicy(tuple(ids), keys, values, fitted(keys, k_params, ids), fitted(values, v_params, ids))
        )
    return Policy(name, tuple(segments), preset.sinks, preset.k_window, preset.v_window)


def preset(name: str) -> Preset:
    """A method by name, as `kvjax.presets.named`; a ValueError for an unknown name lists the nearest."""
    from kvjax.presets import named  # presets are made of the classes here

    return named(str(name))


def policy(name: str, model: Any, calibration: Any = None, text: Any = None, progress: bool = True) -> Policy:
    """The policy of preset `name` for a loaded model, calibrated.

    A preset with fitted constants takes them from `calibration`, else from `calibration/NAME.safetensors` in the
    model's directory, else from the user's cache; where there is none it calibrates now and keeps the result there.
    The bits that asymkv-auto gives each layer are found in the same way, in NAME.json.

    Args:
      name: of a preset, as in "kvquant3".
      model: from `kvjax.load`.
      calibration: a file made by scripts/calibrate.py.
      text: UTF-8 text file to calibrate on, now; without it the model writes its own text.
      progress: show a progress bar while calibrating.

    Raises:
      ValueError, OSError: one line, for an unknown name, for `calibration` or `text` where the preset needs neither or
        both are given, for a calibration file that is damaged or was made for another model, preset or rotary
        embedding, and where one of many processes would have to calibrate.
    """
    chosen = preset(name)
    if calibration is not None and text is not None:
        raise ValueError(
            f"`calibration={calibration}` is fitted already, and `text={text}` to fit on; pass one of them."
        )
    for option, given in (("calibration", calibration), ("text", text)):
        if given is not None and not chosen.is_fitted:
            raise ValueError(f"`{option}={given}`: `quant={name}` needs no calibration; leave it out.")
    layers = model.config.layers
    if chosen.budget is not None:
        from kvjax.calibrate.allocate import allocated

        chosen = allocated(model, name, chosen, calibration=calibration, text=text, progress=progress)
        calibration = None
    if not chosen.needs_params:
        return bind(name, chosen, layers)
    pairs = chosen.codecs(layers, name)
    if not is_builtin(name):  # a mix, or a file: what it takes from built-in methods is fitted under their names
        if calibration is not None:
            raise ValueError(
                f"`calibration` is of a built-in preset, but `quant={name}` is made of others; leave it out."
            )
        k_params, v_params = (
            {
                c: _of_builtin(c, side, model, text, progress)[side]
                for c in {pair[side] for pair in pairs}
                if c.needs_params
            }
            for side in (0, 1)
        )
        return bind(name, chosen, layers, k_params, v_params)
    return bind(name, chosen, layers, *_calibrated(name, chosen, model, calibration, text, progress))


def is_builtin(name: str) -> bool:
    from kvjax.presets import PRESETS  # as in `preset`

    return name in PRESETS


def _of_builtin(codec: AbstractCodec, side: int, model: Any, text: Any, progress: bool) -> tuple[Any, Any]:
    """The fitted constants of the built-in preset that stores keys (side 0) or values (1) with `codec`."""
    from kvjax.presets import PRESETS  # as in `preset`

    for name, found in PRESETS.items():
        if (found.keys, found.values)[side] == codec:
            return _calibrated(name, found, model, None, text, progress)
    raise ValueError(f"`quant` mixes {codec.describe()}, which no built-in preset fits constants for; use a preset's.")


def _calibrated(name: str, chosen: Preset, model: Any, calibration: Any, text: Any, progress: bool) -> tuple[Any, Any]:
    """Constants of keys and values: fitted to `text`, from a file, or fitted now and kept."""
    from kvjax.calibrate import preset as calibrate  # needs this module, and Flax

    if text is not None:
        check_alone(name)
        return calibrate.calibrate(model, name, chosen, text=text, progress=progress).params
    path, cached = fitted_file(model, f"{name}.safetensors")
    path = path if calibration is None else calibration
    if path is not None:
        return calibrate.load(path, model, name, chosen).params
    check_alone(name)
    found = calibrate.calibrate(model, name, chosen, progress=progress)
    cached.parent.mkdir(parents=True, exist_ok=True)
    calibrate.save(cached, found)
    return found.params


def check_alone(name: str, script: str = "scripts/calibrate.py") -> None:
    """Raises ValueError among many processes: each would fit constants by itself, and may hold a part of the model."""
    if jax.process_count() > 1:
        raise ValueError(
            f"`quant={name}` is not calibrated for this model here, and {jax.process_count()} processes do not do it "
            f"together; run {script} first and pass its file with --calibration, or run once in one process."
        )


def fitted_file(model: Any, file_name: str) -> tuple[Path | None, Path]:
    """What was fitted to a model: the file that is there (None if none is), and where to keep a new one.

    `calibration/FILE_NAME` in the model's directory comes first, the user's cache second.
    """
    cached = cache_directory() / model.fingerprint[:16] / file_name
    # What lies beside a model's files was fitted to the weights in them, not to others that were put in their place.
    shipped = Path(model.path) / "calibration" / file_name if model.path and model.file_fingerprint else cached
    return next((path for path in (shipped, cached) if path.is_file()), None), cached


def cache_directory() -> Path:
    """Where calibrations that were made on the way are kept: `$KVJAX_CACHE`, or `~/.cache/kvjax`."""
    return Path(os.environ.get("KVJAX_CACHE") or Path.home() / ".cache" / "kvjax")
