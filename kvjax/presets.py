"""The built-in presets, by name, and the families of names that carry numbers.

| preset | method | paper |
|---|---|---|
| kvquant4, 3, 2 | keys per channel before RoPE, values per token, 1 % outliers, a sink | arXiv 2401.18079, Table 1 |
| -dense | the same without outliers | |
| -qnorm | dequantized with moment-matched tables | arXiv 2401.18079v3 |
| kivi8, 4, 3, 2, 1 | keys per channel, values per token, both in groups of 32; window 128 | arXiv 2402.02750 |
| asymkv-LK-LV | KIVI, 2 bits for the keys of the first LK layers and the values of LV, else 1 | arXiv 2410.13212 |
| asymkv-HI/LO-LK-LV | the same with other widths | |
| asymkv-auto@BITS | bits per layer and tensor, spent where measurement says; BITS true bits per element | |
| asymkv-auto-HI/LO@BITS | the same with two widths only, as asymkv-HI/LO-LK-LV | |
| fp8, fp8-e5m2 | 8-bit floats with a scale per token | arXiv 2209.05433 |
| int8, 4, 3, 2; nf4, 3, 2 | one range per token over the kv width, keys after RoPE | arXiv 2401.18079, Table 1 |
| atom4, 3, 2 | per token in groups of 128 channels (of the head, where it is smaller) | arXiv 2310.19102 |
| flexgen4, 3, 2 | per token in groups of 64 channels | arXiv 2303.06865 |
| alignedkv | float16 in bit planes, read by the paper's criteria | arXiv 2409.16546 |
| alignedkv-budget, -worst | the same read within an error budget (`kvjax.aligned`) | |
| kivi4-aligned | KIVI at 4 bits in planes of 2, of which 0 to 4 bits are read within a budget | |
| bf16, f16, f32 | uncompressed | |

Suffixes of the KIVI and AsymKV families, in this order: -gN group, -wN window (KIVI's R), -eta or -twomean levels
(`kvjax.codecs.affine`; -twomean: two means at 1 bit), -m8 scales and zeros in 8 bits. asymkv-auto without HI/LO chooses
among 1, 2 and 4 bits, and among groups and levels where no suffix settles them. NAME-rot rotates keys and values
(`kvjax.codecs.rotated`). A:B takes the keys of A and the values of B. A name that ends in .toml is a file
(`kvjax.policy_file`).
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Literal

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
from kvjax.codecs.affine import Levels, Meta
from kvjax.policy import Override, Preset


def kvquant(bits: int, outliers: float = 0.01, q_norm: bool = False) -> Preset:
    """KVQuant at `bits` bits (arXiv 2401.18079, sections 3.1 to 3.5; version 6: one attention sink)."""
    return Preset(
        keys=NUQChannelCodec(bits=bits, outliers=outliers, q_norm=q_norm, pre_rope=True),
        values=NUQTokenCodec(bits=bits, outliers=outliers, q_norm=q_norm),
        sinks=1,
    )


def per_token(bits: int, table: Literal["uniform", "nf"]) -> Preset:
    """KVQuant's baselines: one asymmetric range per token over the kv width, keys after RoPE (Appendix P)."""
    codec = AffineCodec(bits, group=None) if table == "uniform" else NUQTokenCodec(bits=bits, table=table)
    return Preset(keys=codec, values=codec)


def grouped(bits: int, group: int) -> Preset:
    """Per token in groups of channels, as Atom (128) and FlexGen (64) store the cache."""
    codec = AffineCodec(bits, group)
    return Preset(keys=codec, values=codec)


def uncompressed(dtype: str) -> Preset:
    return Preset(keys=IdentityCodec(dtype), values=IdentityCodec(dtype))


def aligned(keys: AlignRule, values: AlignRule, sinks: int = 0) -> Preset:
    """AlignedKV (arXiv 2409.16546): float16 in planes, of which a query reads what it needs (`kvjax.aligned`)."""
    return Preset(keys=PlanesCodec("tokens", keys), values=PlanesCodec("channels", values), sinks=sinks)


def aligned_kivi(bits: int, keys: AlignRule, values: AlignRule) -> Preset:
    """KIVI's codes in planes. Values wait for their run of 128 like keys: planes are decided on block by block."""
    return Preset(
        keys=IntPlanesCodec(AffineCodec(bits, 32, "tokens"), keys),
        values=IntPlanesCodec(AffineCodec(bits, 32, "channels"), values),
        k_window=128,
        v_window=128,
    )


def float8(form: Literal["e4m3", "e5m2"]) -> Preset:
    return Preset(keys=Float8Codec(form), values=Float8Codec(form))


def asymkv(
    early: int,
    late: int,
    key_layers: int,
    value_layers: int,
    group: int = 32,
    window: int = 128,
    levels: Levels = "minmax",
    meta: Meta = "float16",
) -> Preset:
    """AsymKV-early/late-key_layers/value_layers (arXiv 2410.13212, section 4) on KIVI's quantizer and windows.

    A step that makes n tokens sees the first R * floor((n - 1) / R) keys as stored and all values but the newest R + 1
    (R = `window`; arXiv 2402.02750, Algorithm 1). Without a window keys wait for their group only, values for nothing.
    """

    def codec(bits: int, along: Literal["tokens", "channels"]) -> AffineCodec:
        return AffineCodec(bits, group, along, "minmax" if levels == "two_mean" and bits > 1 else levels, meta)

    return Preset(
        keys=codec(late, "tokens"),
        values=codec(late, "channels"),
        k_window=window or group,
        v_window=window + 1 if window else 0,
        overrides=tuple(
            override
            for layers, override in (
                (key_layers, Override(tuple(range(key_layers)), keys=codec(early, "tokens"))),
                (value_layers, Override(tuple(range(value_layers)), values=codec(early, "channels"))),
            )
            if layers
        ),
    )


def auto(
    budget: float,
    widths: tuple[int, ...] | None = None,
    group: int | None = None,
    window: int = 128,
    levels: Levels | None = None,
    meta: Meta = "float16",
) -> Preset:
    """AsymKV with `budget` true bits per element, spent by measured sensitivity (`kvjax.calibrate.allocate`).

    Args:
      widths: of codes; None: 1, 2 and 4.
      group, levels: None: as `widths` has them in AsymKV (32, minmax) where it is given; else groups of 32 and 128, and
        levels inside the extremes (two means at 1 bit, eta at 2) as well as minmax, which keeps outliers.
    """
    free = widths is None
    groups = (group,) if group else (128, 32) if free and window % 128 == 0 else (32,)
    options = []
    for bits in sorted(widths or (1, 2, 4)):
        forms: tuple[Levels, ...] = ("minmax",)
        if levels == "eta":
            forms = ("eta",)
        elif bits == 1 and levels == "two_mean":
            forms = ("two_mean",)
        elif bits < 3 and free and levels is None:
            forms = ("two_mean" if bits == 1 else "eta", "minmax")
        options += [kivi_name(bits, size, window, form, meta) for size in groups for form in forms]
    return dataclasses.replace(named(options[0]), budget=budget, options=tuple(options))


def kivi_name(bits: int, group: int = 32, window: int = 128, levels: Levels = "minmax", meta: Meta = "float16") -> str:
    """The name of a member of the KIVI family, without the suffixes that say what goes without saying."""
    parts = (
        f"-g{group}" if group != 32 else "",
        f"-w{window}" if window != 128 else "",
        {"minmax": "", "eta": "-eta", "two_mean": "-twomean"}[levels],
        "-m8" if meta == "int8" else "",
    )
    return f"kivi{bits}{''.join(parts)}"


def kivi(bits: int, group: int = 32, window: int = 128, levels: Levels = "minmax") -> Preset:
    """KIVI at `bits` bits (arXiv 2402.02750, section 3)."""
    return asymkv(bits, bits, 0, 0, group, window, levels)


PRESETS: dict[str, Preset] = {
    "bf16": uncompressed("bfloat16"),
    "f16": uncompressed("float16"),
    "f32": uncompressed("float32"),
    "fp8": float8("e4m3"),
    "fp8-e5m2": float8("e5m2"),
    "int8": per_token(8, "uniform"),
    "int4": per_token(4, "uniform"),
    "int3": per_token(3, "uniform"),
    "int2": per_token(2, "uniform"),
    "nf4": per_token(4, "nf"),
    "nf3": per_token(3, "nf"),
    "nf2": per_token(2, "nf"),
    "atom4": grouped(4, 128),
    "atom3": grouped(3, 128),
    "atom2": grouped(2, 128),
    "flexgen4": grouped(4, 64),
    "flexgen3": grouped(3, 64),
    "flexgen2": grouped(2, 64),
    "kivi8": kivi(8),
    "kivi4": kivi(4),
    "kivi3": kivi(3),
    "kivi2": kivi(2),
    "kivi1": kivi(1),
    "kivi4-aligned": aligned_kivi(4, AlignRule("rms", 2.0**-3), AlignRule("rms", 2.0**-7, skip=True)),
    "alignedkv": aligned(AlignRule(scope="running"), AlignRule(scope="running")),
    "alignedkv-budget": aligned(AlignRule("rms", 2.0**-2), AlignRule("rms", 2.0**-6, skip=True), sinks=1),
    "alignedkv-worst": aligned(AlignRule("worst", 2.0**-2), AlignRule("worst", 2.0**-6, skip=True), sinks=1),
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
}

_SUFFIXES = r"(?:-g(?P<group>\d+))?(?:-w(?P<window>\d+))?(?:-(?P<levels>eta|twomean))?(?P<meta>-m8)?"
_KIVI = re.compile(r"kivi(?P<early>\d)" + _SUFFIXES)
_ASYMKV = re.compile(r"asymkv-(?:(?P<early>\d)/(?P<late>\d)-)?(?P<keys>\d+)-(?P<values>\d+)" + _SUFFIXES)
_AUTO = re.compile(r"asymkv-auto(?:-(?P<early>\d)/(?P<late>\d))?@(?P<budget>\d+(?:\.\d+)?)" + _SUFFIXES)


def named(name: str) -> Preset:
    """The preset of a name, a pair of names A:B, or a TOML file."""
    if is_file(name):
        from kvjax.policy_file import read  # reads names, so it needs this module

        return read(name)
    if ":" in name:
        return pair(*name.split(":", 1))
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith("-rot"):
        return rotated(named(name.removesuffix("-rot")))
    for pattern, early, late in ((_KIVI, 2, None), (_ASYMKV, 2, 1)):
        if found := pattern.fullmatch(name):
            return _asymkv_family(found.groupdict(), early, late)
    if found := _AUTO.fullmatch(name):
        return _auto(found.groupdict())
    near = difflib.get_close_matches(name, PRESETS, n=4, cutoff=0.5) or ["kvquant3", "kivi2", "int4", "fp8", "bf16"]
    raise ValueError(
        f"`quant={name}` is not a preset; the nearest are {', '.join(near)}, and there are asymkv-LK-LV, "
        "asymkv-HI/LO-LK-LV, asymkv-auto@BITS, NAME-rot, KEYS:VALUES and files in TOML (README, Methods)."
    )


def is_file(name: str) -> bool:
    """Whether a name is that of a TOML file; A:B.toml is a pair, unless there is a file of that name."""
    return name.endswith(".toml") and (":" not in name or Path(name).expanduser().is_file())


def _asymkv_family(fields: dict[str, str | None], early: int, late: int | None) -> Preset:
    early = int(fields["early"] or early) if "early" in fields else early
    late = early if late is None else int(fields.get("late") or late)
    levels: Levels = _levels(fields, (early, late)) or "minmax"
    return asymkv(
        early, late, int(fields.get("keys") or 0), int(fields.get("values") or 0),
        int(fields["group"] or 32), int(fields["window"] or 128), levels, "int8" if fields["meta"] else "float16",
    )  # fmt: skip


def _auto(fields: dict[str, str | None]) -> Preset:
    widths = (int(fields["early"] or 0), int(fields["late"] or 0)) if fields["early"] else None
    group = int(fields["group"]) if fields["group"] else None
    levels = _levels(fields, widths or (1,))
    meta: Meta = "int8" if fields["meta"] else "float16"
    return auto(float(fields["budget"] or 0), widths, group, int(fields["window"] or 128), levels, meta)


def _levels(fields: dict[str, str | None], widths: tuple[int, ...]) -> Levels | None:
    if fields["levels"] == "twomean" and 1 not in widths:
        raise ValueError("`quant`: -twomean is of 1-bit codes; use -eta at other widths.")
    return {None: None, "eta": "eta", "twomean": "two_mean"}[fields["levels"]]


def pair(keys: str, values: str) -> Preset:
    """The keys of one preset and the values of another; sinks as many as either wants."""
    for half in (keys, values):
        if ":" in half and not is_file(half):
            raise ValueError(f"`quant={keys}:{values}` has more than two parts; KEYS:VALUES names two presets.")
    k, v = named(keys), named(values)
    if k.budget is not None or v.budget is not None:
        raise ValueError(f"`quant={keys}:{values}`: asymkv-auto chooses keys and values together; use it alone.")
    overrides = [dataclasses.replace(o, values=None) for o in k.overrides if o.keys]
    overrides += [dataclasses.replace(o, keys=None) for o in v.overrides if o.values]
    return Preset(
        k.keys, v.values, max(k.sinks, v.sinks), k.k_window, v.v_window, overrides=tuple(overrides), weights=k.weights
    )


def rotated(preset: Preset) -> Preset:
    """The preset behind a Hadamard rotation of keys and values."""
    if preset.budget is not None:
        raise ValueError("`quant`: asymkv-auto is not measured with rotation; rotate a preset with given bits.")

    def turn(codec: AbstractCodec | None) -> AbstractCodec | None:
        return None if codec is None else RotatedCodec(codec)

    return dataclasses.replace(
        preset,
        keys=RotatedCodec(preset.keys),
        values=RotatedCodec(preset.values),
        overrides=tuple(Override(o.layers, turn(o.keys), turn(o.values)) for o in preset.overrides),
    )
