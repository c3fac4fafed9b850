"""What a preset's cache would cost at the shape of some model, counted on abstract arrays: nothing is allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import decode
from kvjax.cache import CacheShape
from kvjax.codecs.base import AbstractCodec
from kvjax.model.config import ModelConfig
from kvjax.model.known import KNOWN
from kvjax.model.llama import LoadedModel, weight_shapes
from kvjax.model.rope import make_rope
from kvjax.policy import Preset, bind

# Layers, kv heads, head size: all that a cache's bytes depend on.
SHAPES = {name: (config.layers, config.kv_heads, config.head_dim) for name, config in KNOWN.items()}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Cost of one row's cache.

    Attributes:
      bits_per_element: of sealed storage: codes, metadata and outlier slots as allocated.
      nbytes: everything: ring, sinks, tables and counters too.
    """

    bits_per_element: float
    nbytes: int


def cache_shape(name: str) -> CacheShape:
    """A shape of `SHAPES`, or one written as layers x kv heads x head size ("32x8x128").

    Raises:
      ValueError: for anything else.
    """
    sizes: tuple[int, ...] = SHAPES.get(name) or tuple(int(n) for n in name.split("x") if n.isascii() and n.isdigit())
    if len(sizes) != 3 or (name not in SHAPES and name.count("x") != 2) or min(sizes) < 1:
        raise ValueError(
            f"`shape={name}` must be {', '.join(SHAPES)}, or layers x kv heads x head size, as in 32x8x128."
        )
    layers, heads, channels = sizes
    if channels % 2:
        raise ValueError(f"`shape={name}`: the head size {channels} must be even, for the rotary embedding.")
    return CacheShape(layers, heads, heads, channels, make_rope(channels, 4096))


def footprint(name: str, preset: Preset, shape: CacheShape, tokens: int, dtype: Any = jnp.bfloat16) -> Footprint:
    """The cost of the cache of one row of `tokens` tokens; arguments and errors as in `abstract_cache`."""
    cache = abstract_cache(name, preset, shape, tokens, dtype)
    return Footprint(decode.bits_per_element(cache), decode.nbytes(cache))


def abstract_cache(
    name: str, preset: Preset, shape: CacheShape, tokens: int, dtype: Any = jnp.bfloat16, **init: Any
) -> decode.KVCache:
    """A cache of ShapeDtypeStructs.

    Args:
      dtype: of recent tokens and sinks.
      init: further arguments of `decode.init_cache`; batch is 1 without it.

    Raises:
      ValueError: where the preset does not fit the shape: layers it names, groups that do not divide the head size.
    """
    if preset.budget is not None:
        raise ValueError(
            f"`quant={name}`: its bits per layer come from measurements on a model, and there is none of this shape; "
            "use a preset of given bits."
        )
    # Lists, for a pytree's dict must have keys that can be sorted, and codecs cannot.
    sides = [
        list(dict.fromkeys(c for c in codecs if c.needs_params)) for codecs in zip(*preset.codecs(shape.layers, name))
    ]

    def make(params: list[list[Any]]) -> decode.KVCache:
        policy = bind(name, preset, shape.layers, *(dict(zip(*side)) for side in zip(sides, params)))
        return decode.init_cache(shape, policy, **{"batch": 1, "capacity": tokens, "dtype": dtype, **init})

    return jax.eval_shape(make, [[abstract_params(codec, shape) for codec in side] for side in sides])


def abstract_model(config: ModelConfig, tokens: int, dtype: Any) -> LoadedModel:
    """A model of ShapeDtypeStructs, its RoPE that of a context of `tokens`."""
    weights = {n: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for n, shape in weight_shapes(config).items()}
    return LoadedModel(weights, make_rope(config.head_dim, tokens), config)


def abstract_params(codec: AbstractCodec, shape: CacheShape) -> dict[str, jax.ShapeDtypeStruct] | None:
    """The fitted constants of a codec as calibration would make them (`kvjax.calibrate.artefact`), without values."""
    if not codec.needs_params:
        return None
    sizes: dict[str, tuple[int, ...]] = {}
    if getattr(codec, "table", None) == "fitted":
        sizes |= dict.fromkeys(("levels", "decode_levels"), (2**codec.bits,))  # type: ignore[attr-defined]
    if getattr(codec, "ranges", None) == "offline":
        sizes |= dict.fromkeys(("scale", "zero"), (shape.kv_heads, 1, shape.head_dim))
    if not sizes:
        raise ValueError(f"the sizes of the fitted constants of {codec.describe()} are not known for another shape")
    return {name: jax.ShapeDtypeStruct((shape.layers, *size), jnp.float32) for name, size in sizes.items()}
