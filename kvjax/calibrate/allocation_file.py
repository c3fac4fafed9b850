"""The file of an allocation: which option each layer's keys and values take, and what was measured, as JSON."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from kvjax import __version__
from kvjax.calibrate.artefact import check_target
from kvjax.model.llama import LoadedModel
from kvjax.policy import Override, Preset
from kvjax.presets import named

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A spent budget.

    Attributes:
      name: of the preset.
      model: the model's fingerprint.
      layers, kv_heads, head_dim: the model's shape.
      budget: true bits per element that were to be spent.
      options: names of presets, whose keys and values were to choose from.
      bits_per_element: what was spent.
      keys, values: the option of each layer.
      k_sensitivity, v_sensitivity: by layer and option, KL (nats) with this matrix stored and all others exact.
      kl_added_up: the sum of the chosen ones.
      kl: measured with all as chosen.
      measurements: combinations measured jointly.
      source: the text: its file name and sha256, or "self-sampled, seed 0".
      tokens: of it.
    """

    name: str
    model: str
    layers: int
    kv_heads: int
    head_dim: int
    budget: float
    options: tuple[str, ...]
    bits_per_element: float
    keys: tuple[str, ...]
    values: tuple[str, ...]
    k_sensitivity: tuple[tuple[float, ...], ...]
    v_sensitivity: tuple[tuple[float, ...], ...]
    kl_added_up: float
    kl: float
    measurements: int
    source: str
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kvjax": __version__} | dataclasses.asdict(self)


def file_name(name: str, preset: Preset) -> str:
    """NAME.json; a TOML file may come to mean something else, so what it asks for is part of its name."""
    if not name.endswith(".toml"):
        return f"{name.replace('/', '-')}.json"
    asked = json.dumps([preset.budget, preset.options, preset.sinks])
    return f"{Path(name).stem}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"


def as_preset(allocation: Allocation) -> Preset:
    """The codecs of an allocation: the commonest of each kind, and overrides for the other layers."""
    chosen = {"keys": allocation.keys, "values": allocation.values}
    common = {kind: max(sorted(set(names)), key=names.count) for kind, names in chosen.items()}
    keys, values = named(common["keys"]), named(common["values"])
    overrides = []
    for kind, names in chosen.items():
        for name in sorted(set(names) - {common[kind]}):
            layers = tuple(i for i, other in enumerate(names) if other == name)
            overrides.append(Override(layers, **{kind: getattr(named(name), kind)}))
    return dataclasses.replace(keys, values=values.values, v_window=values.v_window, overrides=tuple(overrides))


def to_toml(allocation: Allocation, preset: Preset) -> str:
    """The allocation as a policy file (`kvjax.policy_file`)."""
    chosen = {"keys": allocation.keys, "values": allocation.values}
    common = {kind: max(sorted(set(names)), key=names.count) for kind, names in chosen.items()}
    lines = [
        f"# {allocation.name}: {allocation.bits_per_element:g} true bits per element, measured on {allocation.source}.",
        f"# For the model of fingerprint {allocation.model[:16]}.",
        *(f'{kind} = "{name}"' for kind, name in common.items()),
        *(f"{name} = {getattr(preset, name)}" for name in ("sinks", "k_window", "v_window")),
    ]
    for kind, names in chosen.items():
        for name in sorted(set(names) - {common[kind]}):
            ids = [i for i, other in enumerate(names) if other == name]
            lines += ["", "[[layers]]", f"ids = {ids}", f'{kind} = "{name}"']
    return "\n".join(lines) + "\n"


def save(path: Any, allocation: Allocation) -> None:
    """Writes an allocation; OSError in one line where the place is none to write to."""
    path = check_target(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(allocation.to_json(), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Any, model: LoadedModel, name: str, preset: Preset) -> Allocation:
    """Reads an allocation for preset `name` of `model`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: one line, for a file that is damaged, or of another model, budget or set of options.
    """
    path = Path(path).expanduser()
    way_out = f"allocate again with scripts/allocate.py auto --model {model.path or 'M'} --quant {name} --json {path}"
    if not path.is_file():
        raise FileNotFoundError(f"allocation file {path} does not exist; {way_out}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); {way_out}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: `format` is {found!r}, but this kvjax reads allocations of {FORMAT}; {way_out}.")
    fields = {field.name: field.type for field in dataclasses.fields(Allocation)}
    for field, kind in fields.items():
        if field not in content:
            raise ValueError(f"{path}: `{field}` is missing; {way_out}.")
        wanted = kind if kind in (str, int, float) else list
        if type(content[field]) is not wanted and not (wanted is float and type(content[field]) is int):
            raise ValueError(f"{path}: `{field}` is {content[field]!r}, not {wanted.__name__}; {way_out}.")
    config = model.config
    expected = {
        "model": model.fingerprint,
        "layers": config.layers,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "budget": preset.budget,
        "options": list(preset.options),
    }
    for field, value in expected.items():
        if content[field] != value:
            raise ValueError(f"{path}: `{field}` is {content[field]!r} but must be {value!r} here; {way_out}.")
    if fault := _fault(content):
        raise ValueError(f"{path}: {fault}; {way_out}.")
    settings = {field: content[field] for field in fields}
    for field in ("options", "keys", "values"):
        settings[field] = tuple(settings[field])
    for field in ("k_sensitivity", "v_sensitivity"):
        settings[field] = tuple(map(tuple, settings[field]))
    return Allocation(**settings)


def _fault(content: dict[str, Any]) -> str | None:
    """What makes an allocation unusable, in words; None if nothing does."""
    layers, options = content["layers"], content["options"]
    for field in ("keys", "values"):
        if len(content[field]) != layers or not all(name in options for name in content[field]):
            return f"`{field}` must name one of the options for each of {layers} layers"
    for field in ("k_sensitivity", "v_sensitivity"):
        rows = content[field]
        if len(rows) != layers or not all(isinstance(row, list) and len(row) == len(options) for row in rows):
            return f"`{field}` must be {layers} lists of {len(options)} numbers"
        if not all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row):
            return f"`{field}` has entries that are no finite numbers"
    shape = (128, content["kv_heads"], content["head_dim"])
    pairs = [(named(k).keys, named(v).values) for k, v in zip(content["keys"], content["values"])]
    bits = sum(codec.bits_per_element(*shape) for pair in pairs for codec in pair) / (2 * layers)
    if abs(bits - content["bits_per_element"]) > 1e-6 or bits > content["budget"] + 1e-6:
        return f"`bits_per_element` is {content['bits_per_element']:g}, but the options named spend {bits:g}"
    return None
