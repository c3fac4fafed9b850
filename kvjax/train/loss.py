"""The training loss: the numbers of `kvjax.model.forward`, differentiated with up to a third less work on a CPU.

Two things differ from the plain forward pass, and neither changes a result beyond rounding:

* Attention works on `[B, K, rows, H]`, the layout in which XLA's CPU backend multiplies batches of matrices at full
  speed, and each chunk of queries meets only the keys up to its end. This is what long windows gain by.
* The head never forms all logits. A chunk of tokens goes through head, softmax and the head's gradient at once, so
  `[tokens, V]` exists for one chunk only and the backward pass multiplies by nothing twice.

Measured in `docs/training.md`.

B batch, S tokens, K kv heads, G query heads per kv head, H head size, D width, V vocabulary, N chunks, C tokens of a
row in a chunk.
"""

import jax
import jax.numpy as jnp

from kvjax.model.llama import LoadedModel, _rms_norm
from kvjax.model.rope import cos_sin, rotate

QUERIES = 128  # per chunk: small enough to skip most of the masked half, large enough for full-speed products
LOGITS = 1 << 22  # per chunk, float32: 16 MiB, about what a CPU keeps in its caches and a GPU fills itself with


def hidden(model: LoadedModel, tokens: jax.Array) -> jax.Array:
    """Activations after the last layer, before the final norm: tokens `[B, S]` to `[B, S, D]`."""
    llama, length = model.module(), tokens.shape[1]
    cos, sin = cos_sin(model.rope, jnp.arange(length)[None], jnp.full((1, 1), length))
    cos, sin = cos[:, :, None], sin[:, :, None]  # [1, S, 1, H/2]

    # The backward pass computes the scores again; kept for all layers they would be most of the memory.
    @jax.checkpoint
    def attend(q, k, v):
        q, k = rotate(q, cos[..., None, :], sin[..., None, :]), rotate(k, cos, sin)
        return causal_attention(q, k, v, model.config.sliding_window)

    def one_layer(x, layer):
        return llama.finish(layer, x, attend(*llama.qkv(layer, x))), None

    return jax.lax.scan(one_layer, llama.embed(tokens), jnp.arange(model.config.layers))[0]


def causal_attention(q, k, v, sliding_window: int | None = None) -> jax.Array:
    """`kvjax.model.forward.causal_attention` of a text with itself, `[B, S, K, G, H]`, softmax in float32."""
    B, S, K, G, H = q.shape
    q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
    chunks = []
    for start in range(0, S, QUERIES):
        end = min(start + QUERIES, S)
        rows = (end - start) * G
        scores = jnp.einsum(
            "bkrh,bkth->bkrt",
            q[:, :, start:end].reshape(B, K, rows, H),
            k[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        distance = start + jnp.arange(rows)[:, None] // G - jnp.arange(end)[None]
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        weights = jax.nn.softmax(jnp.where(visible[None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        out = jnp.einsum("bkrt,bkth->bkrh", weights.astype(v.dtype), v[:, :, :end])
        chunks.append(out.reshape(B, K, end - start, G, H))
    return jnp.concatenate(chunks, axis=2).swapaxes(1, 2)


def token_losses(model: LoadedModel, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every next token, in float32.

    Args:
      model: the model.
      tokens: `[B, S + 1]`; each row predicts its tokens from the second on.
      weights: `[B, S]` float32, of each prediction in the sum.

    Returns:
      The weighted sum of the losses, which has a gradient, and the losses `[B, S]` in nats, which have none.
    """
    h = _rms_norm(hidden(model, tokens[:, :-1]), model.state["norm"], model.config.norm_eps)
    head = model.state["embedding" if model.config.tie_embeddings else "head"]
    chunks = _chunks(h.shape[0], h.shape[1], head.shape[0])

    def split(x):  # [B, S, ...] -> [N, B, C, ...]: rows stay whole, so a batch sharded over devices stays in place
        return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    total, losses = _cross_entropy(split(h), head, split(tokens[:, 1:]), split(weights))
    return total, losses.swapaxes(0, 1).reshape(weights.shape)


def _chunks(rows: int, length: int, vocab: int) -> int:
    """Number of chunks a row is cut into: the smallest divisor of `length` that keeps a chunk's logits small."""
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    return next((n for n in divisors if rows * (length // n) * vocab <= LOGITS), length)


@jax.custom_vjp
def _cross_entropy(h, head, targets, weights):
    """Weighted sum of the losses, and the losses `[N, B, C]`; h `[N, B, C, D]`, head `[V, D]`."""

    def chunk(total, x):
        h, targets, weights = x
        losses, _, _ = _losses(h, head, targets)
        return total + jnp.sum(losses * weights), losses

    return jax.lax.scan(chunk, jnp.float32(0), (h, targets, weights))


def _losses(h, head, targets):
    """Losses `[B, C]` of one chunk, and its softmax as numerators `[B, C, V]` and denominators `[B, C, 1]`."""
    logits = jnp.einsum("bcd,vd->bcv", h, head, preferred_element_type=jnp.float32)
    largest = logits.max(axis=-1, keepdims=True)
    numerators = jnp.exp(logits - largest)
    denominators = numerators.sum(axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (jnp.log(denominators) + largest - at_target)[..., 0], numerators, denominators


def _cross_entropy_forward(h, head, targets, weights):
    """d loss / d logits = softmax - one_hot, times the weight; both gradients are formed while the chunk is at hand."""

    def chunk(carry, x):
        total, d_head = carry
        h, targets, weights = x
        losses, numerators, denominators = _losses(h, head, targets)
        hit = jnp.arange(head.shape[0])[None, None] == targets[..., None]
        d_logits = numerators * (weights[..., None] / denominators) - jnp.where(hit, weights[..., None], 0)
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return (total + jnp.sum(losses * weights), d_head), (losses, d_h.astype(h.dtype))

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), (losses, d_h) = jax.lax.scan(chunk, start, (h, targets, weights))
    return (total, losses), (d_h, d_head.astype(head.dtype))


def _cross_entropy_backward(gradients, cotangents):
    d_total, _ = cotangents  # the losses are for the log
    d_h, d_head = gradients
    return d_h * d_total.astype(d_h.dtype), d_head * d_total.astype(d_head.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
