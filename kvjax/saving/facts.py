"""What a save says of itself in JSON: everything static in a cache, so that it can be built again and compared."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import kvjax
from kvjax.cache import CacheShape, KVCache
from kvjax.codecs import CODECS, AlignRule
from kvjax.codecs.base import AbstractCodec
from kvjax.codecs.joined import inner
from kvjax.model.rope import Rope
from kvjax.policy import Policy, SegmentPolicy
from kvjax.sharding import on_host

FORMAT = 2  # of names and meanings of leaves and facts; another one is refused

_CLASSES: dict[str, type] = {**CODECS, "align_rule": AlignRule}
_NAMES = {cls: name for name, cls in _CLASSES.items()}


def of_cache(cache: KVCache, model: Any) -> dict[str, Any]:
    """The facts of a cache; with a loaded model its fingerprint too."""
    numbers = ("block", "sinks", "window", "k_window", "v_window", "capacity", "policy")
    return {
        "kvjax": kvjax.__version__,
        "model": fingerprint(model),
        "shape": of_shape(cache.shape),
        "segments": [of_segment(s) for s in cache.segments],
        **{name: getattr(cache, name) for name in numbers},
        "dtype": str(cache.dtype),
        "blocks": jax.tree.leaves(cache.segments[0].v)[0].shape[2],
        "stripes": cache.stripes,
        "joined": [[getattr(c, "heads", 1) for c in (s.k_codec, s.v_codec)] for s in cache.segments],
        "lengths": on_host(cache.length).tolist(),
    }


def fingerprint(model: Any) -> str | None:
    """A loaded model's; None for a `CacheShape`, and for weights in memory that are spread over other processes."""
    if model is None or isinstance(model, CacheShape):
        return None
    if model.file_fingerprint is None and not all(x.is_fully_addressable for x in model.state.values()):
        return None
    return model.fingerprint


def of_shape(shape: CacheShape) -> dict[str, Any]:
    """A model's dimensions, and its rotary embedding by the frequencies."""
    rope: Rope = shape.rope
    plain = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name != "rope"}
    return plain | {
        "rope": {
            "inv_freq": np.asarray(rope.inv_freq, np.float64).tolist(),
            "attention_factor": rope.attention_factor,
            "dynamic": None if rope.dynamic is None else vars(rope.dynamic),
        }
    }


def of_segment(segment: Any) -> dict[str, Any]:
    """The layers and codecs of a `Segment` or `SegmentPolicy`."""
    return {
        "layers": list(segment.layer_ids),
        "keys": of_codec(inner(segment.k_codec)),
        "values": of_codec(inner(segment.v_codec)),
    }


def of_codec(codec: Any) -> Any:
    """A codec as its name in `CODECS` and its fields; codecs and rules inside it likewise."""
    if type(codec) not in _NAMES:
        return codec
    fields = {f.name: of_codec(getattr(codec, f.name)) for f in dataclasses.fields(codec)}
    return {"name": _NAMES[type(codec)], **fields}


def to_codec(facts: Any) -> Any:
    """The inverse of `of_codec`."""
    if not isinstance(facts, Mapping):
        return facts
    fields = {name: to_codec(value) for name, value in facts.items() if name != "name"}
    try:
        return _CLASSES[facts["name"]](**fields)
    except (KeyError, TypeError):
        raise ValueError(
            f"`directory` holds codes of {facts.get('name')!r}, which this version of kvjax has not."
        ) from None


def to_policy(facts: Mapping[str, Any], params: Mapping[str, Any]) -> Policy:
    """The policy that a cache was made with.

    Args:
      params: leaf name to fitted constants `[L, ...]`, as in "segments.0.k_params.levels".
    """
    segments = []
    for i, part in enumerate(facts["segments"]):
        fitted = []
        for side in ("k_params", "v_params"):
            prefix = f"segments.{i}.{side}."
            fitted.append({n.removeprefix(prefix): x for n, x in params.items() if n.startswith(prefix)} or None)
        codecs: list[AbstractCodec] = [to_codec(part[side]) for side in ("keys", "values")]
        segments.append(SegmentPolicy(tuple(part["layers"]), *codecs, *fitted))
    return Policy(facts["policy"], tuple(segments), facts["sinks"], facts["k_window"], facts["v_window"])


def of_policy(policy: Policy) -> dict[str, Any]:
    """What of a policy decides the meaning of stored bits, under the names of `of_cache`."""
    numbers = {name: getattr(policy, name) for name in ("sinks", "k_window", "v_window")}
    return {"segments": [of_segment(s) for s in policy.segments], **numbers}


def differences(now: Any, before: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Entries of `now` that differ in `before`, both of JSON, as (dotted key, now, before).

    Floats differ by more than 1e-6 of them: rotary frequencies have other last bits on other machines.
    """
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for key in now:
            yield from differences(now[key], before.get(key), f"{path}.{key}" if path else key)
        for key in before:
            if path and key not in now:  # at the top, `before` may say more than is asked
                yield f"{path}.{key}", None, before[key]
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for index, pair in enumerate(zip(now, before)):
            yield from differences(*pair, f"{path}.{index}")
    elif isinstance(now, float) and isinstance(before, float):
        if not math.isclose(now, before, rel_tol=1e-6):
            yield path, now, before
    elif now != before:
        yield path, now, before
