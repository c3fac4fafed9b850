"""What others make of an uncompressed cache: `jax.nn.dot_product_attention`, a plain einsum, torch.

Each takes as many layers as do not fit the last cache, as arrays of their own `[B, T, K, H]` (tokens, kv heads): a
slice of a stack would be copied before a call into a library.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluate.bench import contents, device
from kvjax.evaluate.bench.timing import Candidate, chained
from pallas_kernels.decode_attention import specs

_MOST_LAYERS = 64  # each is a call in the compiled program
DENSE = "dense float32"


def candidates(shape: specs.Shape, context: int, layers: int | None) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """Name and maker of every rival that this platform has; a maker may raise. `layers`: None for enough of them."""
    platform = jax.default_backend()
    if platform == "cpu":
        yield DENSE, lambda: _dense(_arrays(shape, context, jnp.float32, layers))
    bf16 = functools.cache(lambda: _arrays(shape, context, jnp.bfloat16, layers))
    if platform == "gpu":
        yield "jax cudnn", lambda: _jax(bf16(), "cudnn")
    yield "jax xla", lambda: _jax(bf16(), "xla")
    if platform == "gpu":
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            yield (
                f"torch {backend.partition('_')[0].lower()}",
                functools.partial(lambda name: _torch(bf16(), _sdpa(name)), backend),
            )
        yield "flash-attn", lambda: _torch(bf16(), _flash_attn())


class _Arrays(NamedTuple):
    """q `[B, K, G, H]`, keys and values of every layer `[B, T, K, H]`, and how often a call goes round them."""

    q: jax.Array
    ks: list[jax.Array]
    vs: list[jax.Array]
    repeats: int


def _arrays(shape: specs.Shape, context: int, dtype: Any, layers: int | None) -> _Arrays:
    size = (shape.batch, context, shape.heads, shape.channels)
    one = 2 * math.prod(size) * jnp.dtype(dtype).itemsize
    count = layers or min(_MOST_LAYERS, -(-device.rotation_bytes() // one))
    rng = np.random.default_rng(1)
    sample = jnp.asarray(rng.standard_normal((4096, shape.channels)), dtype)
    made = [contents.draw((1, i), sample, size) for i in range(2 * count)]
    q = jnp.asarray(specs.query(shape, rng), dtype)
    return _Arrays(q, made[:count], made[count:], max(1, device.call_bytes() // (count * one)))


def _step_bytes(q: jax.Array, k: jax.Array) -> int:
    return 2 * k.nbytes + 2 * q.nbytes


def _rounds(one: Callable, arrays: _Arrays) -> Candidate:
    """`one(q, k, v)`, of the shape of q, over all layers, `repeats` times."""
    q, ks, vs, repeats = arrays

    @jax.jit
    def run(q, ks, vs):
        def body(_, out):
            for k, v in zip(ks, vs):
                out = one(chained(q, out), k, v)
            return out

        return jax.lax.fori_loop(0, repeats, body, jnp.zeros_like(q))

    if not bool(jnp.isfinite(run(q, ks, vs)).all()):
        raise ValueError("its output is not finite")
    return Candidate(lambda: jax.block_until_ready(run(q, ks, vs)), repeats * len(ks), _step_bytes(q, ks[0]))


def _jax(arrays: _Arrays, implementation: Literal["cudnn", "xla"]) -> Candidate:
    def one(q, k, v):
        flat = q.reshape(q.shape[0], 1, -1, q.shape[-1])
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code does not run under the strict rules of our tests
            out = jax.nn.dot_product_attention(flat, k, v, scale=1.0, implementation=implementation)
        return out.reshape(q.shape)

    return _rounds(one, arrays)


def _dense(arrays: _Arrays) -> Candidate:
    """A float32 cache `[B, K, T, H]` and two products."""

    def one(q, k, v):
        p = jax.nn.softmax(jnp.einsum("bkgh,bkth->bkgt", q, k), axis=-1)
        return jnp.einsum("bkgt,bkth->bkgh", p, v)

    ks, vs = ([jnp.swapaxes(x, 1, 2) for x in side] for side in (arrays.ks, arrays.vs))
    return _rounds(one, arrays._replace(ks=ks, vs=vs))


def _torch(arrays: _Arrays, one: Callable) -> Candidate:
    """The same arrays in torch; a call is one CUDA graph, so launching costs no more than in a compiled loop."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    q, ks, vs, repeats = arrays
    query = torch.from_dlpack(q).reshape(q.shape[0], 1, -1, q.shape[-1])
    sides = [[torch.from_dlpack(x) for x in side] for side in (ks, vs)]

    def run():
        for _ in range(repeats):
            for k, v in zip(*sides):
                out = one(query, k, v)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for k, v in zip(*sides):
            one(query, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def call():
        graph.replay()
        torch.cuda.synchronize()

    call()
    if not bool(torch.isfinite(out).all()):
        raise ValueError("its output is not finite")
    return Candidate(call, repeats * len(ks), _step_bytes(q, ks[0]))


def _sdpa(backend: str) -> Callable:
    """torch's scaled_dot_product_attention by one of its backends, which raises where it cannot."""
    from torch.nn import attention, functional

    def one(q, k, v):
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)

    return one


def _flash_attn() -> Callable:
    """The flash-attn package: version 3 where it is, else 2."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            function = importlib.import_module(name).flash_attn_func
        except ImportError:
            continue
        return lambda q, k, v: function(q, k, v, softmax_scale=1.0)
    raise NotImplementedError("flash-attn is not installed")
