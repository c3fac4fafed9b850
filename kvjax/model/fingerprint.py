"""Names a model by what it computes, so that calibration made for other weights is noticed."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np

from kvjax.model.config import ModelConfig
from kvjax.model.llama import WEIGHTS, LoadedModel
from kvjax.model.rope import Rope

PAGES, PAGE_BYTES = (
    16,
    4096,
)  # 64 KiB of each tensor, in pages spread evenly: reading them touches little of a file

# Where a text stops, how long it may be and how weights once were initialised change no key or value.
# (Dynamic NTK does depend on max_positions: it is part of the Rope.)
_IRRELEVANT = {"bos_id", "eos_ids", "max_positions", "initializer_range"}


def fingerprint(config: ModelConfig, rope: Rope, samples: Mapping[str, str]) -> str:
    """sha256, as hex, over the config and per tensor its name, shape, dtype and at most 64 KiB of its bytes.

    Args:
      config: fields that change no key or value are left out.
      rope: counts by its parameters, whose frequencies may differ in the last bit from machine to machine.
      samples: checkpoint name to `sample` of the tensor as stored.
    """
    fields = {name: value for name, value in vars(config).items() if name not in _IRRELEVANT}
    frequencies = rope.parameters or np.asarray(rope.inv_freq).tolist()
    fields["rope"] = [frequencies, None if rope.dynamic is None else vars(rope.dynamic)]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(samples):
        digest.update(f"{name} {samples[name]}\n".encode())
    return digest.hexdigest()


def sample(array: np.ndarray) -> str:
    """Shape, dtype and sha256 of the first, last and evenly spread pages of a tensor's bytes."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if content.size > PAGES * PAGE_BYTES:
        starts = [page * (content.size - PAGE_BYTES) // (PAGES - 1) for page in range(PAGES)]
        content = np.concatenate([content[start : start + PAGE_BYTES] for start in starts])
    return f"{array.shape} {array.dtype} {hashlib.sha256(content.tobytes()).hexdigest()}"


def of_model(model: LoadedModel) -> str:
    """The fingerprint of a model in memory: that of the checkpoint `save` writes in the model's own dtype."""
    return fingerprint(model.config, model.rope, {name: sample(x) for name, x in checkpoint_tensors(model)})


def checkpoint_tensors(model: LoadedModel) -> Iterator[tuple[str, np.ndarray]]:
    """The weights under their Hugging Face names and in that layout (`[outputs, inputs]`), one at a time."""
    for name, stack in model.state.items():
        spec = WEIGHTS[name]
        values = np.asarray(stack)
        for layer in range(model.config.layers) if spec.stacked else (None,):
            value = values if layer is None else values[layer]
            rows = int(np.prod(value.shape[: spec.outputs]))
            matrix = value.ndim > spec.outputs
            yield spec.tensor.format(layer), value.reshape((rows, -1) if matrix else (rows,))
