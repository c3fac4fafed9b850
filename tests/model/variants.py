"""The model variants that must agree with transformers, each with weights that both sides build from one numpy seed.

A variant is the content of a config.json. `Variant.loaded()` is our model, `Variant.torch_model()` transformers' model
with the same weights, `run_torch` the reference numbers, `golden` the same numbers as stored in tests/golden/parity.npz
(made by tests/golden/make_parity.py), for sessions without torch.

The stored run of a variant, B=1:
  tokens       [44]      24 of the prompt, then 20 that torch chose greedily
  logits       [44, V]   the first 24 from one prefill call, the rest from 20 decode steps through transformers' cache
  full_logits  [44, V]   one call over all 44 tokens without a cache; dynamic RoPE only, elsewhere it equals `logits`
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

PROMPT, STEPS = 24, 20
SEED = 2401
GOLDEN = Path(__file__).parent.parent / "golden" / "parity.npz"

_BASE = {
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_LLAMA = _BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MISTRAL = _BASE | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A named config.json (`raw`); hashed by identity, as `raw` is a dict."""

    name: str
    raw: dict

    def __str__(self) -> str:
        return self.name

    @property
    def dynamic(self) -> bool:
        """Dynamic RoPE: rows of different length have different frequencies."""
        return (self.raw.get("rope_parameters") or {}).get("rope_type") == "dynamic"

    @property
    def sliding_window(self) -> int | None:
        return self.raw.get("sliding_window")

    def config(self):
        """The transformers config."""
        from transformers import LlamaConfig, MistralConfig

        raw = {name: value for name, value in self.raw.items() if name not in ("model_type", "architectures")}
        return (MistralConfig if self.raw["model_type"] == "mistral" else LlamaConfig)(**raw)

    def tensors(self) -> dict[str, np.ndarray]:
        """Checkpoint name to float32 weights, drawn from SEED; sharp enough that positions matter."""
        from kvjax.model.config import ModelConfig
        from kvjax.model.weights import tensor_shapes

        rng = np.random.default_rng(SEED)
        tensors = {}
        for name, shape in tensor_shapes(ModelConfig.from_transformers(self.raw)).items():
            noise = rng.standard_normal(shape).astype(np.float32)
            if "norm" in name:
                tensors[name] = 1 + 0.1 * noise
            elif name.endswith("bias"):
                tensors[name] = 0.3 * noise
            else:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                tensors[name] = noise * np.float32(gain / np.sqrt(shape[1]))
        return tensors

    @functools.cached_property
    def prompt(self) -> np.ndarray:
        """`[PROMPT]` token ids, the same for all variants."""
        return np.random.default_rng(SEED + 1).integers(3, self.raw["vocab_size"], PROMPT)

    def loaded(self, dtype="float32"):
        """Our model."""
        from kvjax.model.config import ModelConfig
        from kvjax.model.llama import LoadedModel
        from kvjax.model.rope import rope_from_config
        from kvjax.model.weights import stack_weights

        config = ModelConfig.from_transformers(self.raw)
        return LoadedModel(stack_weights(config, self.tensors().__getitem__, dtype), rope_from_config(self.raw), config)

    def loaded_to_run(self):
        """`loaded()` without the config's words for its RoPE, which only saving needs and which are static: variants
        that differ in frequencies alone share their compiled programs."""
        model = self.loaded()
        return dataclasses.replace(model, rope=dataclasses.replace(model.rope, parameters=()))

    def torch_model(self):
        """transformers' model in float32 with the same weights; a fresh one, since dynamic RoPE keeps state."""
        import torch
        from transformers import LlamaForCausalLM, MistralForCausalLM

        kind = MistralForCausalLM if self.raw["model_type"] == "mistral" else LlamaForCausalLM
        model = kind._from_config(self.config(), attn_implementation="eager", dtype=torch.float32).eval()
        state = {name: torch.from_numpy(value) for name, value in self.tensors().items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        return model


def run_torch(variant: Variant) -> dict[str, np.ndarray]:
    """The reference numbers of a variant (module docstring)."""
    import torch

    with torch.no_grad():
        model = variant.torch_model()
        tokens = torch.from_numpy(variant.prompt)[None]
        out = model(tokens, use_cache=True)
        logits = [out.logits[0].numpy()]
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, token], dim=1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0].numpy())
        run = {"tokens": tokens[0].numpy().astype(np.int32), "logits": np.concatenate(logits)}
        if variant.dynamic:
            run["full_logits"] = variant.torch_model()(tokens, use_cache=False).logits[0].numpy()
    return run


def golden(variant: Variant) -> dict[str, np.ndarray]:
    """The stored numbers of a variant."""
    with np.load(GOLDEN) as stored:
        prefix = variant.name + "."
        return {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}


def _llama(name: str, **changes) -> Variant:
    return Variant(name, _LLAMA | changes)


def _mistral(name: str, **changes) -> Variant:
    return Variant(name, _MISTRAL | changes)


def _rope(name: str, rope_type: str, **parameters) -> Variant:
    return _llama(name, rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **parameters})


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS = (
    # Head sizes and head counts.
    _llama("plain"),
    _llama("head80-mha", head_dim=80, num_attention_heads=2),
    _llama("head96-mqa", head_dim=96, num_key_value_heads=1),
    _llama("head128-gqa", head_dim=128),
    _llama("head256-mqa", head_dim=256, num_attention_heads=3, num_key_value_heads=1),
    _llama("head-from-width", head_dim=None, num_key_value_heads=None),
    # Switches.
    _llama("attention-bias", attention_bias=True),
    _llama("mlp-bias", mlp_bias=True),
    _llama("tied", tie_word_embeddings=True),
    # RoPE; the text of 44 tokens goes beyond the original contexts of 16 and 32.
    _rope("rope-theta", "default", **{"rope_theta": 500.0}),
    _rope("rope-linear", "linear", factor=4.0),
    Variant("rope-dynamic", _rope("", "dynamic", factor=3.0).raw | {"max_position_embeddings": 16}),
    Variant("rope-dynamic-crossing", _rope("", "dynamic", factor=3.0).raw | {"max_position_embeddings": 32}),
    _rope("rope-yarn", "yarn", **_YARN),
    _rope("rope-yarn-no-truncate", "yarn", **_YARN, truncate=False, beta_fast=4.0, beta_slow=0.5),
    _rope("rope-yarn-mscale", "yarn", **_YARN, mscale=0.7, mscale_all_dim=1.4),
    _rope("rope-yarn-attention-factor", "yarn", **_YARN, attention_factor=0.6),
    _rope("rope-yarn-no-factor", "yarn", **(_YARN | {"factor": None})),
    _rope("rope-llama3", "llama3", factor=8.0, **_LLAMA3),
    # The spelling of transformers 4.
    _llama("rope-v4-linear", rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}),
    _llama("rope-v4-llama3", rope_theta=5000.0, rope_scaling={"rope_type": "llama3", "factor": 8.0, **_LLAMA3}),
    # Mistral; a window shorter than the prompt, and one that the text outgrows while decoding.
    _mistral("mistral"),
    _mistral("mistral-window8", sliding_window=8),
    _mistral("mistral-window30", sliding_window=30, head_dim=128, num_key_value_heads=1),
)
