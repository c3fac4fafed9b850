"""The built-in presets, by name.

| preset | method | paper |
|---|---|---|
| kvquant4, 3, 2 | keys per channel before RoPE, values per token, 1 % outliers, a sink | arXiv 2401.18079, Table 1 |
| -dense | the same without outliers | |
| -qnorm | dequantized with moment-matched tables | arXiv 2401.18079v3 |
| int4, 3, 2; nf4, 3, 2 | the paper's baselines: per token, keys after RoPE | arXiv 2401.18079, Table 1 |
| bf16, f16, f32 | uncompressed | |
"""

from typing import Literal

from kvjax.codecs import IdentityCodec, NUQChannelCodec, NUQTokenCodec
from kvjax.policy import Preset


def kvquant(bits: int, outliers: float = 0.01, q_norm: bool = False) -> Preset:
    """KVQuant at `bits` bits (arXiv 2401.18079, sections 3.1 to 3.5; version 6: one attention sink)."""
    return Preset(
        keys=NUQChannelCodec(bits=bits, outliers=outliers, q_norm=q_norm, pre_rope=True),
        values=NUQTokenCodec(bits=bits, outliers=outliers, q_norm=q_norm),
        sinks=1,
    )


def per_token(bits: int, table: Literal["uniform", "nf"]) -> Preset:
    """The paper's baselines: one asymmetric range per token over the kv width, keys after RoPE (Appendix P)."""
    codec = NUQTokenCodec(bits=bits, table=table)
    return Preset(keys=codec, values=codec)


def uncompressed(dtype: str) -> Preset:
    return Preset(keys=IdentityCodec(dtype), values=IdentityCodec(dtype))


PRESETS: dict[str, Preset] = {
    "bf16": uncompressed("bfloat16"),
    "f16": uncompressed("float16"),
    "f32": uncompressed("float32"),
    "kvquant4": kvquant(4),
    "kvquant3": kvquant(3),
    "kvquant2": kvquant(2),
    "kvquant4-dense": kvquant(4, outliers=0),
    "kvquant3-dense": kvquant(3, outliers=0),
    "kvquant2-dense": kvquant(2, outliers=0),
    "kvquant4-qnorm": kvquant(4, q_norm=True),
    "kvquant3-qnorm": kvquant(3, q_norm=True),
    "kvquant2-qnorm": kvquant(2, q_norm=True),
    "kvquant4-dense-qnorm": kvquant(4, outliers=0, q_norm=True),
    "kvquant3-dense-qnorm": kvquant(3, outliers=0, q_norm=True),
    "kvquant2-dense-qnorm": kvquant(2, outliers=0, q_norm=True),
    "int4": per_token(4, "uniform"),
    "int3": per_token(3, "uniform"),
    "int2": per_token(2, "uniform"),
    "nf4": per_token(4, "nf"),
    "nf3": per_token(3, "nf"),
    "nf2": per_token(2, "nf"),
}
