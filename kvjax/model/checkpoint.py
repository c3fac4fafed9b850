"""Reading safetensors checkpoints tensor by tensor: one file or many, bfloat16 included, without torch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kvjax.model.config import read_json

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class Checkpoint:
    """The tensors of a directory's safetensors files, read on demand from memory-mapped files.

    Attributes:
      shapes: tensor name to shape.
      dtypes: tensor name to stored dtype.
    """

    def __init__(self, directory: Path):
        """Opens the headers of all files; raises one-line FileNotFoundError or ValueError naming the file."""
        self._files = contextlib.ExitStack()
        self._slices: dict[str, tuple[Path, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        listed = _listed_files(directory)
        for path in sorted(set(listed.values())) if listed else _found_files(directory):
            self._open(path)
        for name, path in listed.items():
            if name not in self._slices:
                raise ValueError(f"{path} has no tensor {name}, which its index promises; download it again.")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_):
        self._slices.clear()
        self._files.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._slices[name][0]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor in its stored dtype."""
        return self._slices[name][1][:] if self.shapes[name] else self._slices[name][1][...]

    def _open(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but the checkpoint's index names it; download it again.")
        try:
            file = self._files.enter_context(safetensors.safe_open(path, framework="numpy"))
        except Exception as error:  # safetensors has its own exception type, and OSError for some files
            raise ValueError(
                f"{path} is no complete safetensors file ({str(error).splitlines()[0]}); download it again."
            ) from None
        for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
            view = file.get_slice(name)
            stored = view.get_dtype()
            if stored not in DTYPES:
                raise ValueError(
                    f"{path} stores {name} as {stored}, which is not supported (quantized checkpoint?); "
                    f"supported are {', '.join(DTYPES)}."
                )
            self._slices[name] = (path, view)
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = DTYPES[stored]


def _listed_files(directory: Path) -> dict[str, Path]:
    """Tensor name to file, from the index of a sharded checkpoint; empty where there is no index."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no `weight_map`; download it again.")
    return {name: directory / file for name, file in weight_map.items()}


def _found_files(directory: Path) -> list[Path]:
    """model.safetensors, or else whatever *.safetensors there is except the vendors' own layout."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not found:
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in directory.glob(pattern))
        came = f" (only {others[0]})" if others else ""
        raise FileNotFoundError(
            f"{directory} has no *.safetensors{came}; save the model again with transformers' save_pretrained."
        )
    return found
