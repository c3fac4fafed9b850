"""Saving and resuming, by Orbax: sharded, in the background, and never half.

saving.save_cache(cache, "moby", tokens=tokens, model=model)             # pay for a long document once
cache, tokens = saving.load_cache("moby", model, capacity=20_000, mesh=mesh)
saving.save_model(model, "weights"); model = saving.load_model("weights", mesh=mesh)
"""

from kvjax.saving.caches import load_cache, load_policy, read_facts, save_cache
from kvjax.saving.models import load_model, save_model
from kvjax.saving.store import Saving, check_directory

__all__ = [
    "Saving",
    "check_directory",
    "load_cache",
    "load_model",
    "load_policy",
    "read_facts",
    "save_cache",
    "save_model",
]
