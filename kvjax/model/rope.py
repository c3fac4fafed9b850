"""Rotary position embedding, in every variant that Llama and Mistral checkpoints ask for.

The convention is Hugging Face's "half split": channel i turns with channel i + H/2 by position * inv_freq[i],

    rotate(x) = [x1 * cos - x2 * sin,  x2 * cos + x1 * sin],   x = [x1, x2].

Sources: RoPE (Su et al., arXiv 2104.09864, section 3.4), linear interpolation (Chen et al., arXiv 2306.15595,
section 3.3), dynamic NTK and YaRN (Peng et al., arXiv 2309.00071, sections 3.1 to 3.4), llama3 (the Llama 3.1
release). Where the papers leave a choice, transformers 5.23 (`modeling_rope_utils`) decides it, because
checkpoints are published against it.

Which frequencies: the formula in float64, not the float32 that transformers rounds it to. The two differ by at most
4e-3 rad at 128K tokens, as far as checkpoints were trained, and float32 products as they were trained with are off by
as much again: nothing a model could have learned. Beyond, only the formula is the same for everyone: at 10^7 tokens
(LLaMA's head size and theta) the rounded frequencies, even if multiplied exactly, are up to 0.30 rad from it and
float32 products up to 0.80 rad. Here the angle is within 3e-7 rad of it (`kvjax.model.turns`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.model import turns as fixed_point

Leaf = Any  # an array, or whatever JAX rebuilds a pytree with (specs, ShapeDtypeStruct, None)

SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """Constants of dynamic NTK scaling: inv_freq depends on the length of the row.

    base(n) = base * (factor * max(n, max_position) / max_position - (factor - 1)) ** (dim / (dim - 2))
    inv_freq(n)[i] = base(n) ** (-2 i / dim)
    """

    base: float
    dim: int
    max_position: int
    factor: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies of a model.

    Frequencies that no Hugging Face config describes: `Rope(kvjax.model.turns.from_frequencies(inv_freq))`.

    Attributes:
      turns: turns per position in fixed point (`kvjax.model.turns`), two leaves `[H/2]` int32; with `dynamic`, those of
        rows up to `max_position`.
      attention_factor: multiplies cos and sin (YaRN's temperature); static.
      dynamic: constants of dynamic NTK scaling, or None; static.
      parameters: the `rope_parameters` of a Hugging Face config this was made from, as sorted pairs; static.
        Needed to save a model, otherwise unused.
    """

    turns: fixed_point.Turns
    attention_factor: float = jax.tree.static(default=1.0)
    dynamic: DynamicNTK | None = jax.tree.static(default=None)  # noqa: RUF009
    parameters: tuple[tuple[str, Any], ...] = jax.tree.static(default=())

    @property
    def inv_freq(self) -> np.ndarray:
        """`[H/2]` float32, radians per position, in [0, 2 pi). Not for use inside jit."""
        return fixed_point.to_frequencies(self.turns).astype(np.float32)


def cos_sin(rope: Rope, positions, lengths=None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles of each position.

    Angles are within 3e-7 rad of the formula in float64 up to 10^7 positions and within 3e-5 rad up to 2^31
    (`kvjax.model.turns`). Those of dynamic NTK are not: its frequencies are computed here, in float32, from the length
    of the row, and so are the products: up to 1e-3 rad off at 16K positions, 1e-2 at 128K, 0.8 at 10^7.

    Args:
      rope: the frequencies.
      positions: integers `[...]` of magnitude below 2^31, negative ones too.
      lengths: tokens in the row after this call, broadcastable to `positions`; needed by dynamic NTK only.

    Returns:
      cos, sin: each `[..., H/2]` float32, times `attention_factor`.
    """
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"`positions` is {positions.dtype}, but angles are exact for integers only; pass int32.")
    if rope.dynamic is None:
        cos, sin = fixed_point.cos_sin(fixed_point.phase(rope.turns, positions.astype(jnp.int32)))
    else:
        cos, sin = _dynamic_cos_sin(rope.dynamic, positions, lengths)
    return cos * rope.attention_factor, sin * rope.attention_factor


def _dynamic_cos_sin(dynamic: DynamicNTK, positions: jax.Array, lengths) -> tuple[jax.Array, jax.Array]:
    if lengths is None:
        raise ValueError("`lengths=None`, but dynamic NTK frequencies depend on it; pass the number of tokens per row.")
    inv_freq = _dynamic_frequencies(dynamic, jnp.asarray(lengths))
    missing_axes = positions.ndim + 1 - inv_freq.ndim
    inv_freq = inv_freq.reshape((1,) * missing_axes + inv_freq.shape)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def _dynamic_frequencies(dynamic: DynamicNTK, lengths: jax.Array) -> jax.Array:
    """inv_freq `[..., dim/2]` float32 of rows with `lengths` `[...]` tokens (equations in `DynamicNTK`)."""
    length = jnp.maximum(lengths, dynamic.max_position).astype(jnp.float32)
    stretch = dynamic.factor * length / dynamic.max_position - (dynamic.factor - 1)
    base = dynamic.base * stretch ** (dynamic.dim / (dynamic.dim - 2))
    exponents = jnp.arange(0, dynamic.dim, 2, dtype=jnp.float32) / dynamic.dim
    return 1.0 / base[..., None] ** exponents.reshape((1,) * lengths.ndim + exponents.shape)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the two halves of each head by the given angles, in float32.

    Args:
      x: `[..., H]`.
      cos: `[..., H/2]` float32, as many axes as `x`; axes of size 1 broadcast (heads).
      sin: as `cos`.

    Returns:
      `[..., H]` in the dtype of `x`.
    """
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"`x` has {x.shape[-1]} channels but `cos` turns {2 * cos.shape[-1]}; it must turn every channel."
        )
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rope_from_config(config) -> Rope:
    """Reads the rotary embedding of a transformers config (or its dict), in the v5 or the v4 spelling.

    v5 has one dict `rope_parameters`; v4 has `rope_theta` and an optional dict `rope_scaling`.

    Raises:
      ValueError: for a type that is not in `SUPPORTED`, and for partial rotary embedding.
    """
    config = config if isinstance(config, Mapping) else config.to_dict()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    max_positions = config.get("max_position_embeddings", 2048)
    # `rope_scaling` first: transformers lets it win when a converted config carries both.
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if nested := [name for name, value in parameters.items() if isinstance(value, Mapping)]:
        raise ValueError(f"`rope_parameters` differs by layer type ({', '.join(nested)}); that is not supported.")
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") is not None:
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return make_rope(head_dim, max_positions, **parameters)


def make_rope(head_dim: int, max_positions: int, **parameters) -> Rope:
    """Builds a rotary embedding from the keys of Hugging Face's `rope_parameters`.

    Args:
      head_dim: H.
      max_positions: the config's `max_position_embeddings`.
      **parameters: `rope_type` (default "default"), `rope_theta` (default 10000.0) and what the type needs.
    """
    parameters = {name: value for name, value in parameters.items() if value is not None}
    legacy_type = parameters.pop("type", "default")
    kind = parameters.setdefault("rope_type", legacy_type)
    theta = parameters["rope_theta"] = float(parameters.get("rope_theta", 10000.0))
    if kind not in SUPPORTED:
        raise ValueError(f"`rope_type={kind!r}` is not supported; supported are {', '.join(SUPPORTED)}.")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("`partial_rotary_factor` below 1 is not supported; every channel of a head must be rotated.")
    if head_dim % 2:
        raise ValueError(f"`head_dim={head_dim}` must be even: rotary embedding turns pairs of channels.")
    if kind in ("yarn", "llama3"):
        parameters.setdefault("original_max_position_embeddings", max_positions)

    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    attention_factor, dynamic = 1.0, None
    if kind == "default":
        inv_freq = plain
    elif kind == "linear":
        inv_freq = plain / _number(parameters, "factor", kind)
    elif kind == "dynamic":
        inv_freq = plain
        dynamic = DynamicNTK(theta, head_dim, max_positions, _number(parameters, "factor", kind))
    elif kind == "yarn":
        inv_freq, attention_factor = _yarn(plain, theta, head_dim, max_positions, parameters)
    else:
        inv_freq = _llama3(plain, parameters)
    return Rope(
        # numpy, not jnp: building a Rope must not wake a device, and JAX takes the array at the first use.
        turns=fixed_point.from_frequencies(inv_freq),
        attention_factor=attention_factor,
        dynamic=dynamic,
        parameters=tuple(sorted(parameters.items())),
    )


def _yarn(plain, theta, head_dim, max_positions, parameters) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, 3.2): fast channels are kept, slow ones interpolated, with a ramp between."""
    original = _number(parameters, "original_max_position_embeddings", "yarn")
    parameters.setdefault("factor", max_positions / original)
    factor = _number(parameters, "factor", "yarn")

    def channel_of(rotations):  # the (real) channel that turns `rotations` times within the original context
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(parameters.get("beta_fast") or 32), channel_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    inv_freq = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(mscale):  # section 3.3: 0.1 ln(s) + 1
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = parameters.get("attention_factor")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None:
        attention_factor = (
            temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1)
        )
    return inv_freq, float(attention_factor)


def _llama3(plain, parameters) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, with a ramp between."""
    factor = _number(parameters, "factor", "llama3")
    low = _number(parameters, "low_freq_factor", "llama3")
    high = _number(parameters, "high_freq_factor", "llama3")
    original = _number(parameters, "original_max_position_embeddings", "llama3")
    turns = original * plain / (2 * math.pi)  # within the original context: original / wavelength
    kept = (turns - low) / (high - low)
    smoothed = (1 - kept) * plain / factor + kept * plain
    return np.where(turns < low, plain / factor, np.where(turns > high, plain, smoothed))


def _number(parameters: Mapping, name: str, kind: str) -> float:
    if not isinstance(parameters.get(name), int | float):
        raise ValueError(
            f"`{name}={parameters.get(name)!r}` in `rope_parameters`, but type {kind!r} needs a number there."
        )
    return float(parameters[name])
