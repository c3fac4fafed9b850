"""What a checkpoint's config.json says, reduced to the static numbers that the model needs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from kvjax.model.rope import Rope

# What transformers assumes where config.json is silent (LlamaConfig and MistralConfig of 5.23).
_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DEFAULTS = {
    "llama": _COMMON
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static shape and switches of a Llama or Mistral model; hashable.

    Attributes:
      layers, width, mlp_width, q_heads, kv_heads, head_dim, vocab: L, D, F, K * G, K, H, V.
      norm_eps: added to the mean square in RMSNorm.
      attention_bias: the q, k, v and o projections have biases.
      mlp_bias: the gate, up and down projections have biases.
      tie_embeddings: the output head is the embedding table.
      sliding_window: a key is visible iff q_position - k_position < sliding_window; None: no such limit.
      max_positions: the longest context the model was made for; a statement, not a limit of the code.
      bos_id, eos_ids: token ids, None or empty where the config names none.
      initializer_range: standard deviation of random weights.
    """

    layers: int
    width: int
    mlp_width: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in (
            "layers",
            "width",
            "mlp_width",
            "q_heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "max_positions",
        ):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"`{name}={number!r}` must be a positive integer.")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"`kv_heads={self.kv_heads}` must divide q_heads={self.q_heads}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window={self.sliding_window}` must be positive, or None for no window.")

    @property
    def q_per_kv(self) -> int:
        """G, the query heads that share one kv head."""
        return self.q_heads // self.kv_heads

    @classmethod
    def from_transformers(cls, config) -> "ModelConfig":
        """Takes a transformers config, or the dict that config.json holds.

        Raises:
          ValueError: one line, for an architecture, activation, quantization or layer pattern without support.
        """
        fields = complete(config)
        kind, eos = fields["model_type"], fields["eos_token_id"]
        q_heads = fields["num_attention_heads"]
        return cls(
            layers=fields["num_hidden_layers"],
            width=fields["hidden_size"],
            mlp_width=fields["intermediate_size"],
            q_heads=q_heads,
            kv_heads=fields["num_key_value_heads"] or q_heads,
            head_dim=fields["head_dim"] or fields["hidden_size"] // q_heads,
            vocab=fields["vocab_size"],
            norm_eps=float(fields["rms_norm_eps"]),
            # As in transformers, Mistral ignores the bias switches and Llama ignores a window.
            attention_bias=kind == "llama" and bool(fields["attention_bias"]),
            mlp_bias=kind == "llama" and bool(fields["mlp_bias"]),
            tie_embeddings=bool(fields["tie_word_embeddings"]),
            sliding_window=fields["sliding_window"] if kind == "mistral" else None,
            max_positions=fields["max_position_embeddings"],
            bos_id=fields["bos_token_id"],
            eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            initializer_range=float(fields["initializer_range"]),
        )

    def to_transformers(self, rope: Rope, dtype: str) -> dict:
        """The config.json of this model, in v5 spelling; `from_transformers`, `rope_from_config` read it back."""
        if not rope.parameters:
            raise ValueError("`rope.parameters` is empty, so the model cannot be saved; build it with make_rope.")
        if self.sliding_window is not None and (self.attention_bias or self.mlp_bias):
            raise ValueError("`sliding_window` together with biases has no Hugging Face architecture to be saved as.")
        mistral = self.sliding_window is not None
        common = {
            "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
            "model_type": "mistral" if mistral else "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.norm_eps,
            "bos_token_id": self.bos_id,
            "eos_token_id": (
                None if not self.eos_ids else self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
            ),
            "tie_word_embeddings": self.tie_embeddings,
            "rope_parameters": dict(rope.parameters),
            "dtype": dtype,
        }
        if mistral:
            return common | {"sliding_window": self.sliding_window}
        return common | {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}


def complete(config) -> dict:
    """The fields of a transformers config or of a config.json, with defaults filled in; refuses what has no support."""
    raw = dict(config) if isinstance(config, Mapping) else config.to_dict()
    fields = DEFAULTS[_check_supported(raw)] | raw
    for name in ("hidden_size", "num_attention_heads"):  # the head size may have to be computed from them
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ValueError(f"`{name}={fields[name]!r}` must be a positive integer.")
    return fields


def read_config(directory: Path) -> dict:
    """A checkpoint's config.json, with the end-of-text ids of generation_config.json where there are any."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; pass a directory in Hugging Face layout (config.json, *.safetensors)."
        )
    raw = read_json(path)
    generation = directory / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        raw["eos_token_id"] = eos  # chat models stop at more ids than their config.json names
    return raw


def read_json(path: Path) -> dict:
    """A JSON object from a file; the error of a damaged file names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a JSON object is wanted; download it again.")
    return content


def _check_supported(raw: Mapping) -> str:
    """The model type of a config; refuses in one line what the model cannot compute."""
    named = next(iter(raw.get("architectures") or []), None)
    kind = raw.get("model_type")
    if kind not in DEFAULTS or (named is not None and ARCHITECTURES.get(named) != kind):
        raise ValueError(
            f"architecture {named or kind!r} is not supported; supported are {', '.join(ARCHITECTURES)} "
            f"(model_type llama or mistral)."
        )
    if raw.get("quantization_config") or raw.get("compression_config"):
        quantization = raw.get("quantization_config") or raw.get("compression_config")
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"the checkpoint's weights are quantized ({method}), which is not supported; "
            f"use the bf16, f16 or f32 checkpoint of the same model."
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"`hidden_act={raw['hidden_act']!r}` is not supported; supported is silu.")
    if len(set(raw.get("layer_types") or [])) > 1:
        raise ValueError(
            f"`layer_types` mixes {', '.join(sorted(set(raw['layer_types'])))}, which is not supported; "
            f"supported is one kind of attention in all layers."
        )
    return kind
