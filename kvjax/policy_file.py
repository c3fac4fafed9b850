"""Presets in TOML: any mix of methods by layer, for what has no name of its own.

keys = "kvquant3"        # or quant = "kivi2" for both
values = "kivi2"
sinks = 4                # as in kvjax.policy.Preset; those of the named presets unless set
k_window = 128
v_window = 129

[[layers]]               # any number of them, applied in order
ids = [0, 1, -1]         # negative ones count from the last
quant = "kivi4"          # or keys, values, or one of them
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from kvjax.policy import Override, Preset
from kvjax.presets import named, pair

_NUMBERS = ("sinks", "k_window", "v_window")


def read(path: Any) -> Preset:
    """The preset that a TOML file describes; OSError or ValueError in one line where it does not."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise OSError(
            f"`quant={path}` cannot be read ({error.strerror}); pass a TOML file or a preset's name."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`quant={path}` is not TOML: {error}.") from None
    _only(path, content, ("quant", "keys", "values", *_NUMBERS, "layers"))
    keys, values = _names(path, content)
    if not keys or not values:
        raise ValueError(f"`quant={path}` must set `quant`, or `keys` and `values`, to the names of presets.")
    preset = named(keys) if keys == values else pair(keys, values)
    for name in _NUMBERS:
        if name in content:
            if type(content[name]) is not int or content[name] < 0:
                raise ValueError(f"`quant={path}`: `{name}={content[name]!r}` must be a number of tokens, 0 or more.")
            preset = dataclasses.replace(preset, **{name: content[name]})
    layers = content.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(table, dict) for table in layers):
        raise ValueError(f"`quant={path}`: `layers` must be tables, each headed [[layers]].")
    overrides = preset.overrides + tuple(_override(path, table) for table in layers)
    if overrides and preset.budget is not None:
        raise ValueError(f"`quant={path}`: asymkv-auto chooses every layer itself; leave [[layers]] out.")
    return dataclasses.replace(preset, overrides=overrides)


def _override(path: Any, table: dict[str, Any]) -> Override:
    _only(path, table, ("ids", "quant", "keys", "values"))
    ids = table.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"`quant={path}`: `ids={ids!r}` of [[layers]] must be a list of layer numbers.")
    keys, values = _names(path, table)
    if not keys and not values:
        raise ValueError(f"`quant={path}`: [[layers]] must set `quant`, `keys` or `values`.")
    return Override(
        tuple(ids), _plain(path, keys).keys if keys else None, _plain(path, values).values if values else None
    )


def _plain(path: Any, name: str) -> Preset:
    preset = named(name)
    if preset.overrides or preset.budget is not None:
        raise ValueError(f"`quant={path}`: {name!r} differs by layer; in [[layers]] name presets that do not.")
    return preset


def _names(path: Any, table: dict[str, Any]) -> tuple[str | None, str | None]:
    both = table.get("quant")
    if both is not None and ("keys" in table or "values" in table):
        raise ValueError(f"`quant={path}`: `quant` stands for both; leave out `keys` and `values`, or `quant`.")
    names = table.get("keys", both), table.get("values", both)
    for name in names:
        if name is not None and (not isinstance(name, str) or name.endswith(".toml")):
            raise ValueError(f"`quant={path}`: {name!r} must be the name of a preset.")
        if both is None and name is not None and ":" in name:
            raise ValueError(
                f"`quant={path}`: {name!r} is a pair; name one preset as `keys` or `values`, or set `quant`."
            )
    return names


def _only(path: Any, table: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"`quant={path}`: unknown key `{unknown[0]}`; known are {', '.join(known)}.")
