"""Decode attention for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: picks the tile decoders of a storage."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.formats import Affine, Dense, Format, Partial, Rotation, describe, shape_of

SHARED_BYTES = 226 << 10  # of a block on an H100, less barriers


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, for what the kernel does not do."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"The Hopper kernel needs JAX 0.11, and with it Python 3.12; this is JAX {jax.__version__}."
        )
    if not 1 <= group <= 16:
        raise NotImplementedError(f"The Hopper kernel takes 1 to 16 query heads per kv head, not {group}.")
    *_, tokens, channels = shape_of(k)
    if channels not in (64, 96, 128, 256):
        raise NotImplementedError(f"The Hopper kernel takes head sizes 64, 96, 128 and 256, not {channels}.")
    if rotates:
        raise NotImplementedError("The Hopper kernel does not rotate keys that are stored before RoPE yet.")
    if tokens not in (128, 256, 512):
        raise NotImplementedError(f"The Hopper kernel takes blocks of 128, 256 or 512 tokens, not {tokens}.")
    for name, fmt in (("keys", k), ("values", v)):
        why = _refusal(fmt, name)
        if why:
            raise NotImplementedError(f"The Hopper kernel does not read {name} of {describe(fmt)}: {why}.")
    _, *decoders = _decoders(k, v, group)
    needed = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for d in decoders for x in d.scratch())
    if needed > SHARED_BYTES:
        raise NotImplementedError(
            f"The Hopper kernel needs {needed >> 10} KiB of shared memory for keys of {describe(k)} and values of "
            f"{describe(v)} at head size {channels}; there are {SHARED_BYTES >> 10}."
        )


def _refusal(fmt: Format, name: str) -> str:
    """Why not, or nothing."""
    channels = shape_of(fmt)[5]
    if isinstance(fmt, Dense):
        return "head size 96 is not a multiple of its tiles" if channels == 96 else ""
    if not isinstance(fmt, Affine):
        return "there is no decoder for them yet"
    if fmt.bits == 3:
        return "3-bit codes straddle words"
    if fmt.along != ("tokens" if name == "keys" else "channels") and _size(fmt) != channels:
        return "keys are scaled per channel or per whole token, values per token"
    if fmt.dtype != "float16":
        return "scales must be float16"
    return ""


def _size(fmt: Affine) -> int:
    *_, tokens, channels = shape_of(fmt)
    return (tokens if fmt.along == "tokens" else channels) // fmt.scale.shape[-2]


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
    *,
    chip: str,
    interpret: Any,
    splits: int | None = None,
) -> Partial:
    """As `api.decode_attention`; `splits` overrides how many programs share a row and head."""
    from pallas_kernels.decode_attention import gpu_skeleton

    plan, keys, values = _decoders(k, v, q.shape[2], interpret, splits)
    return gpu_skeleton.attend(plan, keys, values, k, v, q, layer, first, last)


def _decoders(k: Any, v: Any, group: int, interpret: Any = None, splits: int | None = None):
    from pallas_kernels.decode_attention import gpu_affine, gpu_dense, gpu_skeleton

    module = {Dense: gpu_dense, Affine: gpu_affine}
    rows = tuple(module[type(x)].word_rows(x) for x in (k, v))
    plan = gpu_skeleton.plan(k, group, rows, interpret, splits)
    keys: Any
    values: Any
    if isinstance(k, Dense):
        keys = gpu_dense.DenseKeys(plan, k.dtype)
    elif k.along == "tokens":
        keys = gpu_affine.KeysPerChannel(plan, k.bits, _size(k))
    else:
        keys = gpu_affine.KeysPerToken(plan, k.bits, _size(k))
    if isinstance(v, Dense):
        values = gpu_dense.DenseValues(plan, v.dtype)
    else:
        values = gpu_affine.ValuesPerToken(plan, v.bits, _size(v))
    return plan, keys, values
