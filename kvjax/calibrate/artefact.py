"""The calibration file: fitted tables as safetensors, with everything that must agree when they are used again.

Tensors: `keys.levels`, `keys.decode_levels` `[L, 2^bits]`, `keys.scale`, `keys.zero` `[L, K, 1, H]`,
`values.levels`, `values.decode_levels` `[L, 2^bits]`, float32. Metadata: the fields of `Meta` and a checksum,
each a JSON text; those of keys and values are named `keys.bits` and so on.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

FORMAT = 1
CODED = ("keys", "values")


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """What the constants of keys or values were fitted for.

    Attributes:
      bits: per code.
      table: the weights of `fit_tables`.
      outliers: fraction with a slot; keys: also what lies outside the ranges.
      slots: per token and head.
      pre_rope: before the rotary embedding.
    """

    bits: int
    table: str
    outliers: float
    slots: int
    pre_rope: bool


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a calibration file says about itself.

    Attributes:
      preset: the preset it was made for; others with the same settings may use it.
      keys, values: their settings.
      sinks: tokens at the start of each sequence that were left out.
      qnorm: `decode_levels` are matched in their moments; if not, they are `levels`.
      model: the model's fingerprint.
      layers, kv_heads, head_dim: the model's shape.
      rope: from `describe_rope`.
      source: the calibration text: its file name and sha256, or "self-sampled, seed 0".
      tokens: how many calibration tokens there were.
      kvjax: the version that wrote the file.
    """

    preset: str
    keys: TensorMeta
    values: TensorMeta
    sinks: int
    qnorm: bool
    model: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    source: str
    tokens: int
    kvjax: str

    def coded(self) -> dict[str, TensorMeta]:
        return {"keys": self.keys, "values": self.values}

    def flat(self) -> dict[str, Any]:
        """The fields, those of `keys` and `values` as `keys.bits` and so on."""
        fields: dict[str, Any] = {}
        for name, value in vars(self).items():
            fields |= {f"{name}.{part}": v for part, v in vars(value).items()} if name in CODED else {name: value}
        return fields


def _field_types() -> dict[str, Any]:
    types: dict[str, Any] = {}
    for field in dataclasses.fields(Meta):
        if field.name in CODED:
            types |= {f"{field.name}.{part.name}": part.type for part in dataclasses.fields(TensorMeta)}
        else:
            types[field.name] = field.type
    return types


def describe_rope(rope) -> str:
    """The rotary embedding as canonical JSON: its parameters, or what can be told from a `Rope` without them."""
    if rope is None:
        return "null"
    if rope.parameters:
        facts = dict(rope.parameters)
    else:
        # Six digits: the last ones differ between the pow functions of different machines.
        ends = [float(f"{float(f):.6g}") for f in (rope.inv_freq[0], rope.inv_freq[-1])]
        facts = {"inv_freq": ends, "attention_factor": rope.attention_factor}
    if rope.dynamic is not None:
        facts["max_position"] = rope.dynamic.max_position
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def model_facts(model) -> dict[str, Any]:
    """The fields of `Meta` that a loaded model settles."""
    config = model.config
    return {
        "layers": config.layers,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rope": describe_rope(model.rope),
        "model": model.fingerprint,
    }


def check_target(path) -> Path:
    """Raises OSError where `save` could not write; worth asking before an hour of calibration."""
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`out={path}`: directory {path.parent} does not exist; create it first.")
    if path.is_dir():
        raise IsADirectoryError(f"`out={path}` is a directory; name a file in it.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"`out={path}`: directory {path.parent} is not writable; choose another.")
    return path


def save(path, tables: Mapping[str, Mapping[str, np.ndarray]], meta: Meta) -> None:
    """Writes `tables` (as from `fit_tables`) whole or not at all."""
    tensors = {
        f"{tensor}.{name}": np.ascontiguousarray(array, np.float32)
        for tensor, arrays in tables.items()
        for name, array in arrays.items()
    }
    if fault := _fault(tensors, meta):
        raise ValueError(f"these tables would not load again: {fault}.")
    metadata = {"format": json.dumps(FORMAT)}
    metadata |= {name: json.dumps(value) for name, value in meta.flat().items()}
    metadata["sha256"] = json.dumps(_checksum(tensors, metadata))
    path = check_target(path)
    # A file beside the target: the rename then stays on one file system and is atomic.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors_numpy.save(tensors, metadata))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path, expect: Mapping[str, Any] | None = None, way_out: str = "") -> tuple[dict[str, dict], Meta]:
    """Reads a calibration file and checks it.

    Args:
      path: the file.
      expect: fields of `Meta.flat()` and the values they must have.
      way_out: ends every error; by default how to calibrate again.

    Returns:
      The tables as they were given to `save`, and the file's `Meta`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: one line, for a file that is damaged, is something else, or disagrees with `expect`.
    """
    path = Path(path).expanduser()
    way_out = way_out or f"recalibrate with scripts/calibrate.py --model M --quant Q --out {path}"
    if not path.is_file():
        raise FileNotFoundError(f"calibration file {path} does not exist; {way_out}.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or no safetensors file ({reason}); {way_out}.") from None
    meta = _parse(path, metadata, way_out)
    if json.loads(metadata["sha256"]) != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents; {way_out}.")
    facts = meta.flat()
    for name, wanted in (expect or {}).items():
        found = facts[name]
        if found != wanted:
            raise ValueError(f"{path}: `{name}` is {found!r} in the file but must be {wanted!r} here; {way_out}.")
    if fault := _fault(tensors, meta):
        raise ValueError(f"{path}: {fault}; {way_out}.")
    tables: dict[str, dict] = {"keys": {}, "values": {}}
    for name, array in tensors.items():
        tensor, _, part = name.partition(".")
        tables[tensor][part] = array
    return tables, meta


def _parse(path: Path, metadata: Mapping[str, str], way_out: str) -> Meta:
    fields = _field_types()
    missing = [name for name in ("format", *fields, "sha256") if name not in metadata]
    if "format" in missing:
        raise ValueError(f"{path} is a safetensors file but no kvjax calibration; {way_out}.")
    try:
        values = {name: json.loads(metadata[name]) for name in ("format", *fields, "sha256") if name in metadata}
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged: its metadata is not JSON; {way_out}.") from None
    if values["format"] != FORMAT:
        raise ValueError(f"{path}: `format` is {values['format']!r} but this kvjax reads {FORMAT}; {way_out}.")
    if missing:
        raise ValueError(f"{path}: metadata {', '.join(missing)} missing; {way_out}.")
    for name, wanted in fields.items():
        if type(values[name]) is not wanted:
            raise ValueError(f"{path}: `{name}` is {values[name]!r}, not {wanted.__name__}; {way_out}.")
    parts = [part.name for part in dataclasses.fields(TensorMeta)]
    plain: dict[str, Any] = {name: values[name] for name in fields if "." not in name}
    nested: dict[str, Any] = {t: TensorMeta(**{part: values[f"{t}.{part}"] for part in parts}) for t in CODED}
    return Meta(**nested, **plain)


def _fault(tensors: Mapping[str, np.ndarray], meta: Meta) -> str | None:
    """What makes these tensors unusable, in words; None if nothing does."""
    ranges = (meta.layers, meta.kv_heads, 1, meta.head_dim)
    shapes = {
        "keys.levels": (meta.layers, 2**meta.keys.bits),
        "keys.decode_levels": (meta.layers, 2**meta.keys.bits),
        "keys.scale": ranges,
        "keys.zero": ranges,
        "values.levels": (meta.layers, 2**meta.values.bits),
        "values.decode_levels": (meta.layers, 2**meta.values.bits),
    }
    if tensors.keys() != shapes.keys():
        return f"tensors {sorted(tensors)} where {sorted(shapes)} are wanted"
    for name, shape in shapes.items():
        array = tensors[name]
        if array.shape != shape or array.dtype != np.float32:
            return f"`{name}` is {array.dtype}{list(array.shape)}, not float32{list(shape)}"
        if not np.isfinite(array).all():
            return f"`{name}` has values that are not finite"
        if name.endswith("levels") and (np.diff(array, axis=-1) < 0).any():
            return f"`{name}` is not sorted"
    if (tensors["keys.scale"] <= 0).any():
        return "`keys.scale` has values that are not positive"
    return None


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in metadata.items() if k != "sha256"}, sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _umask() -> int:
    # mkstemp makes files private; a calibration is as public as any other file. Reading the mask sets it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
