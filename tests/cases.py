"""Every codec with settings to test it at, mildest first, and constants for those that need fitted ones."""

import numpy as np

from kvjax.codecs import (
    AbstractCodec,
    AffineCodec,
    AlignRule,
    Float8Codec,
    IdentityCodec,
    IntPlanesCodec,
    NUQChannelCodec,
    NUQTokenCodec,
    PlanesCodec,
    RotatedCodec,
)
from kvjax.model.config import ModelConfig
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import Policy, Preset, bind

CODEC_CASES: dict[str, AbstractCodec] = {
    "identity-f32": IdentityCodec(dtype="float32"),
    "identity-bf16": IdentityCodec(dtype="bfloat16"),
    "identity-f16": IdentityCodec(dtype="float16"),
    "affine8": AffineCodec(bits=8, group=8),
    "affine4-token": AffineCodec(bits=4, group=None),
    "affine3-eta-int8": AffineCodec(bits=3, group=8, levels="eta", meta="int8"),
    "affine2": AffineCodec(bits=2, group=8),
    "affine1-two-mean": AffineCodec(bits=1, group=8, levels="two_mean"),
    "affine4-tokens": AffineCodec(bits=4, group=32, along="tokens"),
    "affine2-tokens-bf16": AffineCodec(bits=2, group=64, along="tokens", meta="bfloat16", pre_rope=True),
    "affine1-tokens-int8": AffineCodec(bits=1, group=32, along="tokens", meta="int8"),
    "float8-e4m3": Float8Codec("e4m3"),
    "float8-e5m2": Float8Codec("e5m2"),
    "rotated-affine4": RotatedCodec(AffineCodec(bits=4, group=None)),
    "planes-keys": PlanesCodec("tokens", AlignRule()),
    "planes-values": PlanesCodec("channels", AlignRule("rms", 2.0**-8, skip=True)),
    "int-planes-keys": IntPlanesCodec(AffineCodec(bits=4, group=32, along="tokens"), AlignRule("rms", 0.1)),
    "int-planes-values": IntPlanesCodec(AffineCodec(bits=8, group=8), AlignRule("worst", 2.0**-6)),
    "token-int4": NUQTokenCodec(bits=4, table="uniform"),
    "token-nf3": NUQTokenCodec(bits=3, table="nf"),
    "token-nuq4": NUQTokenCodec(bits=4),
    "token-nuq3-1%": NUQTokenCodec(bits=3, outliers=0.01),
    "token-nuq2-5%": NUQTokenCodec(bits=2, outliers=0.05, q_norm=True),
    "channel-nuq4": NUQChannelCodec(bits=4, pre_rope=True),
    "channel-nuq3-1%": NUQChannelCodec(bits=3, outliers=0.01, pre_rope=True),
    "channel-nuq2-5%": NUQChannelCodec(bits=2, outliers=0.05, q_norm=True, pre_rope=True),
    "channel-int3": NUQChannelCodec(bits=3, table="uniform"),
    "channel-block-nuq4": NUQChannelCodec(bits=4, ranges="block", pre_rope=True),
    "channel-block-int3-1%": NUQChannelCodec(bits=3, ranges="block", table="uniform", outliers=0.01),
}


def make_params(codec: AbstractCodec, kv_heads: int, head_dim: int, seed: int = 0) -> dict[str, np.ndarray] | None:
    """Random fitted constants of one layer for any codec."""
    if not codec.needs_params:
        return None
    rng = np.random.default_rng(seed)
    params = {}
    if getattr(codec, "table", None) == "fitted":
        levels = np.sort(rng.uniform(-1, 1, 2**codec.bits)).astype(np.float32)
        params = {"levels": levels, "decode_levels": (1.1 * levels + 0.01).astype(np.float32)}
    if isinstance(codec, NUQChannelCodec) and codec.ranges == "offline":
        params["scale"] = rng.uniform(1.0, 2.5, (kv_heads, 1, head_dim)).astype(np.float32)
        params["zero"] = rng.normal(0, 0.3, (kv_heads, 1, head_dim)).astype(np.float32)
    return params


def make_policy(preset: Preset, layers: int, kv_heads: int, head_dim: int, name: str = "test") -> Policy:
    """A preset with random constants, different in every layer."""

    def stacked(codec):
        per_layer = [make_params(codec, kv_heads, head_dim, seed) for seed in range(layers)]
        return None if per_layer[0] is None else {n: np.stack([p[n] for p in per_layer]) for n in per_layer[0]}

    return bind(name, preset, layers, stacked(preset.keys), stacked(preset.values))


def random_kv(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Gaussian channels of unequal scale with a few large elements, float32."""
    x = rng.normal(size=shape) * np.exp(rng.normal(0, 0.5, shape[-1]))
    return (x * np.where(rng.uniform(size=shape) < 0.01, 6.0, 1.0)).astype(np.float32)


def small_model() -> LoadedModel:
    """A random model whose predictions are not flat: 2 layers, 2 kv heads of 32, 64 tokens of vocabulary."""
    config = ModelConfig(
        layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=32, vocab=64, initializer_range=0.3
    )
    return init_random(config, make_rope(32, 512), seed=0)


def small_windows() -> np.ndarray:
    """Text for it."""
    return np.random.default_rng(0).integers(0, 64, (5, 80)).astype(np.int32)
