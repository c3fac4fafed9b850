"""Weights to and from disk, each shard straight from and to its device."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import kvjax
from kvjax.model.config import ModelConfig, complete
from kvjax.model.llama import LoadedModel, weight_shapes
from kvjax.model.rope import rope_from_config
from kvjax.saving.store import Save, Saving, write
from kvjax.sharding import model_shardings


def save_model(model: LoadedModel, directory: Any, *, wait: bool = True) -> Saving:
    """Saves a model's weights as they are sharded; the former save stays until this one is complete.

    The tokenizer is not saved, only where it was: `load_model` looks for it there.

    Args:
      model: on any mesh; in several processes each calls this.
      directory, wait: as in `save_cache`.

    Raises:
      OSError, ValueError: as `save_cache`.
    """
    known = {
        "kvjax": kvjax.__version__,
        "config": model.config.to_transformers(model.rope, str(model.dtype)),
        "path": model.path,
        "file_fingerprint": model.file_fingerprint,
    }
    return write(directory, "model", model.state, known, wait)


def load_model(directory: Any, *, mesh: Any = None, path: Any = None) -> LoadedModel:
    """Loads what `save_model` wrote: every device reads its own shards and no others.

    Args:
      directory: as `save_model` was given.
      mesh: devices to spread the weights over, from `kvjax.sharding.make_mesh`; None for the default device.
      path: directory of the tokenizer; None for where the model came from.

    Raises:
      ValueError, FileNotFoundError: one line, as `load_cache`.
    """
    with Save(directory, "model") as save:
        fields = complete(save.facts["config"])
        config, rope = ModelConfig.from_transformers(fields), rope_from_config(fields)
        dtype, shapes = jnp.dtype(fields["dtype"]), weight_shapes(config)
        rope_to: Any = None
        shardings: Any = dict.fromkeys(shapes)
        if mesh is not None:
            rope_to, shardings = NamedSharding(mesh, PartitionSpec()), model_shardings(config, mesh)
        wanted = {n: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[n]) for n, shape in shapes.items()}
        for name, want in wanted.items():
            save.check(name, want.shape, dtype)
        path = save.facts["path"] if path is None else str(Path(path).expanduser())
        rope = jax.device_put(rope, rope_to)
        return LoadedModel(save.read(wanted), rope, config, path, save.facts["file_fingerprint"])
