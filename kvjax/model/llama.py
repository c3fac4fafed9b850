"""Llama 1 to 3.x and Mistral as one Flax NNX module over `[L, ...]` weight stacks, and the model around it.

L layers, D width, F MLP width, K kv heads, G query heads per kv head, H head size, V vocabulary.
Weights keep the order of the checkpoint (outputs before inputs), so loading only reshapes; heads have an axis of
their own, so that tensor parallelism can shard K.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.model.config import ModelConfig
from kvjax.model.rope import Leaf, Rope


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight: its name in a Hugging Face checkpoint, and its axes here.

    Attributes:
      tensor: checkpoint name; `{}` stands for the layer and marks a stacked weight.
      axes: axis letters of one layer's slice, outputs first; a stack has L in front.
      outputs: how many of `axes` the checkpoint flattens into axis 0; the rest become axis 1.
    """

    tensor: str
    axes: str
    outputs: int

    @property
    def stacked(self) -> bool:
        return "{}" in self.tensor


_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."
WEIGHTS = {
    "embedding": WeightSpec("model.embed_tokens.weight", "VD", 1),
    "attention_norm": WeightSpec("model.layers.{}.input_layernorm.weight", "D", 1),
    "q": WeightSpec(_ATTENTION + "q_proj.weight", "KGHD", 3),
    "k": WeightSpec(_ATTENTION + "k_proj.weight", "KHD", 2),
    "v": WeightSpec(_ATTENTION + "v_proj.weight", "KHD", 2),
    "o": WeightSpec(_ATTENTION + "o_proj.weight", "DKGH", 1),
    "q_bias": WeightSpec(_ATTENTION + "q_proj.bias", "KGH", 3),
    "k_bias": WeightSpec(_ATTENTION + "k_proj.bias", "KH", 2),
    "v_bias": WeightSpec(_ATTENTION + "v_proj.bias", "KH", 2),
    "o_bias": WeightSpec(_ATTENTION + "o_proj.bias", "D", 1),
    "mlp_norm": WeightSpec("model.layers.{}.post_attention_layernorm.weight", "D", 1),
    "gate": WeightSpec(_MLP + "gate_proj.weight", "FD", 1),
    "up": WeightSpec(_MLP + "up_proj.weight", "FD", 1),
    "down": WeightSpec(_MLP + "down_proj.weight", "DF", 1),
    "gate_bias": WeightSpec(_MLP + "gate_proj.bias", "F", 1),
    "up_bias": WeightSpec(_MLP + "up_proj.bias", "F", 1),
    "down_bias": WeightSpec(_MLP + "down_proj.bias", "D", 1),
    "norm": WeightSpec("model.norm.weight", "D", 1),
    "head": WeightSpec("lm_head.weight", "VD", 1),
}


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight that a model of this config has; stacked weights start with L."""
    sizes = {
        "V": config.vocab,
        "D": config.width,
        "F": config.mlp_width,
        "K": config.kv_heads,
        "G": config.q_per_kv,
        "H": config.head_dim,
    }
    absent = set()
    if config.tie_embeddings:
        absent |= {"head"}
    if not config.attention_bias:
        absent |= {"q_bias", "k_bias", "v_bias", "o_bias"}
    if not config.mlp_bias:
        absent |= {"gate_bias", "up_bias", "down_bias"}
    return {
        name: (config.layers,) * spec.stacked + tuple(sizes[axis] for axis in spec.axes)
        for name, spec in WEIGHTS.items()
        if name not in absent
    }


class Llama(nnx.Module):
    """A Llama or Mistral decoder without its attention: the caller computes `out` between `qkv` and `finish`.

    `layer` is a Python or a traced integer. Activations `[..., D]` have any leading axes and the model's dtype;
    matrix products accumulate in float32, RMSNorm computes in float32.
    """

    embedding: nnx.Param
    norm: nnx.Param
    head: nnx.Param  # absent where the embedding is tied

    def __init__(self, config: ModelConfig):
        """The structure, with weights of zero: `weights.load` and `weights.init_random` make the real ones."""
        self.config = config
        for name, shape in weight_shapes(config).items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids `[...]` to activations `[..., D]`."""
        return self.embedding[...][tokens]

    def qkv(self, layer, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Input norm and projections of activations `[..., D]`, before the rotary embedding.

        Returns:
          q `[..., K, G, H]`, k `[..., K, H]`, v `[..., K, H]`.
        """
        h = _rms_norm(x, self._at("attention_norm", layer), self.config.norm_eps)
        q = self._project("...d,kghd->...kgh", h, "q", layer)
        k = self._project("...d,khd->...kh", h, "k", layer)
        v = self._project("...d,khd->...kh", h, "v", layer)
        return q, k, v

    def finish(self, layer, x: jax.Array, out: jax.Array) -> jax.Array:
        """The rest of a layer: output projection, residual, norm, gated MLP, residual.

        Args:
          layer: which one.
          x: `[..., D]`, what `qkv` was given.
          out: `[..., K, G, H]`, the attention's result.

        Returns:
          `[..., D]`, the input of the next layer.
        """
        x = x + self._project("...kgh,dkgh->...d", out, "o", layer)
        h = _rms_norm(x, self._at("mlp_norm", layer), self.config.norm_eps)
        gate = self._project("...d,fd->...f", h, "gate", layer)
        up = self._project("...d,fd->...f", h, "up", layer)
        return x + self._project("...f,df->...d", nnx.silu(gate) * up, "down", layer)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final norm and output head: activations `[..., D]` to logits `[..., V]` float32."""
        h = _rms_norm(x, self.norm[...], self.config.norm_eps)
        head = self.embedding if self.config.tie_embeddings else self.head
        return jnp.einsum("...d,vd->...v", h, head[...], preferred_element_type=jnp.float32)

    def _at(self, name: str, layer) -> jax.Array:
        """One layer's slice of a stack."""
        return jax.lax.dynamic_index_in_dim(getattr(self, name)[...], layer, keepdims=False)

    def _project(self, equation: str, x: jax.Array, name: str, layer) -> jax.Array:
        """Matrix product accumulated in float32, bias (where there is one) added there, result in the dtype of `x`."""
        axes = len(equation.split(",")[0].removeprefix("..."))

        def product(x):
            return jnp.einsum(equation, x, self._at(name, layer), preferred_element_type=jnp.float32)

        if math.prod(x.shape[: x.ndim - axes]) == 1:
            y = jax.lax.platform_dependent(
                x, default=product, cuda=lambda x: product_of_one(x, getattr(self, name)[...], layer, axes)
            )
        else:
            y = product(x)
        if hasattr(self, f"{name}_bias"):
            bias = self._at(f"{name}_bias", layer).astype(jnp.float32)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y.astype(x.dtype)


def product_of_one(x: jax.Array, stack: jax.Array, layer, axes: int) -> jax.Array:
    """One layer's matrix product for a single token, as a sum of products: float32.

    XLA on GPU copies a layer out of its stack for a matrix product, so every weight is read, written and read again; a
    reduction reads it where it is (Llama-3-8B, H100, real compiler: 336 MB of temporaries become 3 MB).

    Args:
      x: `[1, ..., *in]`, the last `axes` axes are summed over.
      stack: `[L, *out, *in]`.
    """
    out = stack.shape[1 : stack.ndim - axes]
    matrices = stack.reshape(stack.shape[0], math.prod(out), -1)
    matrix = jax.lax.dynamic_index_in_dim(matrices, layer, keepdims=False).astype(jnp.float32)
    y = (matrix * x.reshape(1, -1).astype(jnp.float32)).sum(-1)
    return y.reshape(x.shape[: x.ndim - axes] + out)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467, section 4): x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (x32 * scale * weight).astype(x.dtype)


@functools.lru_cache(maxsize=64)
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    """The module's structure without weights; split once per config, then only merged."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config)))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for use: weights and rotary frequencies as leaves, everything else static.

    `module()` gives the `Llama` to call. Use it inside `jax.jit` with the LoadedModel as an argument: then the
    weights are inputs of the compiled function and not constants in it.

    Attributes:
      state: dict of weight name (`weight_shapes`) to array, all of one dtype.
      rope: rotary frequencies.
      config: static shape and switches.
      path: directory that the weights came from; None for a model built in memory.
      file_fingerprint: of the files that the weights came from; None for a model built in memory.
    """

    state: Leaf
    rope: Rope
    config: ModelConfig = jax.tree.static()  # noqa: RUF009
    path: str | None = jax.tree.static(default=None)
    file_fingerprint: str | None = jax.tree.static(default=None)

    def module(self) -> Llama:
        return nnx.merge(_graphdef(self.config), self.state)

    @property
    def dtype(self):
        """Of weights and activations."""
        return self.state["embedding"].dtype

    @property
    def fingerprint(self) -> str:
        """Names config and weights: sha256 over samples (`kvjax.model.fingerprint`). Not for use inside jit."""
        if self.file_fingerprint is not None:
            return self.file_fingerprint
        from kvjax.model.fingerprint import of_model  # imports this module

        return of_model(self)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `path`, read at the first use (imports transformers)."""
        from kvjax.model.tokenizer import load_tokenizer  # deferred with transformers, which it needs

        return load_tokenizer(self.path, self.config)

    def with_state(self, state: dict) -> "LoadedModel":
        """The same model with other weights, say of a training step; drops the fingerprint of the files."""
        return dataclasses.replace(self, state=state, file_fingerprint=None)
