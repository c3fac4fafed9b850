"""Compressed K/V caches for JAX: contexts at 1 to 8 bits per element on CPU, GPU and TPU.

model = kvjax.load("tiny")
policy = kvjax.policy("kvquant3", model)
cache = kvjax.decode.init_cache(model, policy, batch=1, capacity=1024)
tokens, cache = kvjax.decode.generate(model, cache, prompt, max_new_tokens=100)
"""

from typing import Any

from kvjax import decode, sharding
from kvjax.cache import CacheShape, KVCache

# The function, over the module of the same name: `from kvjax.policy import Preset` still reaches the module.
from kvjax.policy import Policy, Preset, policy

__all__ = ["CacheShape", "KVCache", "Policy", "Preset", "decode", "load", "policy", "sharding"]
__version__ = "0.1.0"


def load(source: Any, dtype: Any = None, mesh: Any = None) -> Any:
    """Loads a Llama or Mistral model: "tiny", a directory in Hugging Face layout, or a hub id; over a mesh, if given.

    See `kvjax.model.weights.load`, which is imported here and not before: Flax takes longer to import than the rest.
    """
    from kvjax.model import weights

    return weights.load(source, dtype, mesh=mesh)
