"""Policies: which codec pair each layer's cache uses, with what was fitted for it.

A `Preset` is a method's name made concrete but not yet bound to a model; `Policy` is a preset bound to a number of
layers and to fitted constants, ready for `kvjax.decode.init_cache`.
"""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from kvjax.cache import CacheShape
from kvjax.codecs.base import AbstractCodec


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method: codecs for keys and values, exact tokens at both ends, and how it is calibrated.

    Attributes:
      keys, values: the codecs of every layer.
      sinks: the first tokens stay exact (KVQuant section 3.5).
      window: the newest tokens are seen exactly by later ones (token-local codecs).
      weights: of the k-means that fits tables: "fisher*s2" (arXiv 2401.18079, Eq. 7), "fisher" (the released code) or
        "none".
    """

    keys: AbstractCodec
    values: AbstractCodec
    sinks: int = 0
    window: int = 0
    weights: str = "fisher*s2"

    @property
    def needs_params(self) -> bool:
        return self.keys.needs_params or self.values.needs_params


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentPolicy:
    """Consecutive layers with one codec pair; params leaves are `[layers, ...]`, or None."""

    first_layer: int
    layers: int
    k_codec: AbstractCodec
    v_codec: AbstractCodec
    k_params: Any = None
    v_params: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A preset bound to a model's layers.

    Attributes:
      name: for reports.
      segments: in layer order, without gaps.
      sinks, window: as in `Preset`.
    """

    name: str
    segments: tuple[SegmentPolicy, ...]
    sinks: int = 0
    window: int = 0

    def check(self, shape: CacheShape) -> None:
        """Raises ValueError where the policy was made for a model of another shape."""
        layers = sum(segment.layers for segment in self.segments)
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


def bind(name: str, preset: Preset, layers: int, k_params: Any = None, v_params: Any = None) -> Policy:
    """A preset for `layers` layers, with fitted constants (leaves `[layers, ...]`) where its codecs need them."""
    segment = SegmentPolicy(0, layers, preset.keys, preset.values, k_params, v_params)
    return Policy(name, (segment,), preset.sinks, preset.window)


def preset(name: str) -> Preset:
    """A built-in preset by name; a ValueError for an unknown name lists the nearest."""
    from kvjax.presets import PRESETS  # presets are made of the classes here

    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=4, cutoff=0.5) or list(PRESETS)
        raise ValueError(f"`quant={name}` is not a preset; the nearest are {', '.join(near)}.")
    return PRESETS[name]


def policy(name: str, model: Any, calibration: Any = None, text: Any = None, progress: bool = True) -> Policy:
    """The policy of preset `name` for a loaded model, calibrated.

    A preset with fitted constants takes them from `calibration`, else from `calibration/NAME.safetensors` in the
    model's directory, else from the user's cache; where there is none it calibrates now and keeps the result there.

    Args:
      name: of a preset, as in "kvquant3".
      model: from `kvjax.load`.
      calibration: a file made by scripts/calibrate.py.
      text: UTF-8 text file to calibrate on, now; without it the model writes its own text.
      progress: show a progress bar while calibrating.

    Raises:
      ValueError, OSError: one line, for an unknown name, and for a calibration file that is damaged or was made for
        another model, preset or rotary embedding.
    """
    chosen = preset(name)
    layers = model.config.layers
    if not chosen.needs_params:
        return bind(name, chosen, layers)
    from kvjax.calibrate import preset as calibrate  # needs this module, and Flax

    if text is not None:
        found = calibrate.calibrate(model, name, chosen, text=text, progress=progress)
        return bind(name, chosen, layers, *found.params)
    cached = cache_directory() / model.fingerprint[:16] / f"{name}.safetensors"
    shipped = Path(model.path) / "calibration" / cached.name if model.path else cached
    path = calibration or next((p for p in (shipped, cached) if p.is_file()), None)
    if path is not None:
        return bind(name, chosen, layers, *calibrate.load(path, model, name, chosen).params)
    found = calibrate.calibrate(model, name, chosen, progress=progress)
    cached.parent.mkdir(parents=True, exist_ok=True)
    calibrate.save(cached, found)
    return bind(name, chosen, layers, *found.params)


def cache_directory() -> Path:
    """Where calibrations that were made on the way are kept: `$KVJAX_CACHE`, or `~/.cache/kvjax`."""
    return Path(os.environ.get("KVJAX_CACHE") or Path.home() / ".cache" / "kvjax")
