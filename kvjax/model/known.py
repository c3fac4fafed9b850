"""Shapes of well-known models, and the config of any other, without its weights."""

from kvjax.model.config import ModelConfig, complete, read_config
from kvjax.model.weights import find

# LLaMA (arXiv 2302.13971, Table 2) and Llama 3 (arXiv 2407.21783, Table 3), vocabularies as in their checkpoints.
KNOWN = {
    "llama-7b": ModelConfig(layers=32, width=4096, mlp_width=11008, q_heads=32, kv_heads=32, head_dim=128, vocab=32000),
    "llama-3-8b": ModelConfig(
        layers=32, width=4096, mlp_width=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256
    ),
    "llama-3-70b": ModelConfig(
        layers=80, width=8192, mlp_width=28672, q_heads=64, kv_heads=8, head_dim=128, vocab=128256
    ),
}


def model_config(source: str) -> ModelConfig:
    """The config of a model: a name in `KNOWN`, in any case, or what `kvjax.load` takes. No weights are read.

    Raises:
      ValueError, FileNotFoundError: one line, for what is neither, and for an architecture without support.
    """
    if (name := source.lower()) in KNOWN:
        return KNOWN[name]
    try:
        directory = find(source, weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(error).rstrip('.')}, or one of {', '.join(KNOWN)}.") from None
    return ModelConfig.from_transformers(complete(read_config(directory)))
