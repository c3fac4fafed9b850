"""Decode attention for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: picks the tile decoders of a storage."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import gpu_planes
from pallas_kernels.decode_attention.formats import (
    Affine,
    Codebook,
    Dense,
    Format,
    Partial,
    Planes,
    Rotation,
    describe,
    shape_of,
)

SHARED_BYTES = 219 << 10  # of a block on an H100 (227 KiB), less what Mosaic adds for reductions and barriers

MOST_COPIED = 256  # elements along one axis that the copy engine takes at once


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, for what the kernel does not do."""
    if chip not in ("", "sm_90"):
        raise NotImplementedError(f"The Hopper kernel needs an H100 or H200 (sm_90), not {chip}.")
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"The Hopper kernel needs JAX 0.11, and with it Python 3.12; this is JAX {jax.__version__}."
        )
    if not 1 <= group <= 16:
        raise NotImplementedError(f"The Hopper kernel takes 1 to 16 query heads per kv head, not {group}.")
    *_, tokens, channels = shape_of(k)
    if channels not in (64, 96, 128, 256):
        raise NotImplementedError(f"The Hopper kernel takes head sizes 64, 96, 128 and 256, not {channels}.")
    if isinstance(k, Codebook) or isinstance(v, Codebook):
        why = _codebook_refusal(k, v, rotates)
        if why:
            raise NotImplementedError(f"The Hopper kernel does not read {describe(k)} with {describe(v)}: {why}.")
        _fits(k, v, decoders(k, v, group)[1:])
        return
    if rotates:
        raise NotImplementedError("The Hopper kernel does not rotate keys that are stored before RoPE in this format.")
    if isinstance(k, Planes) or isinstance(v, Planes):
        if why := gpu_planes.refusal(k, v):
            raise NotImplementedError(f"The Hopper kernel does not read {describe(k)} with {describe(v)}: {why}.")
        return
    if tokens not in (128, 256, 512):
        raise NotImplementedError(f"The Hopper kernel takes blocks of 128, 256 or 512 tokens, not {tokens}.")
    for name, fmt in (("keys", k), ("values", v)):
        why = _refusal(fmt, name)
        if why:
            raise NotImplementedError(f"The Hopper kernel does not read {name} of {describe(fmt)}: {why}.")
    _fits(k, v, decoders(k, v, group)[1:])


def _fits(k: Format, v: Format, sides) -> None:
    needed = _bytes(sides)
    if needed > SHARED_BYTES:
        raise NotImplementedError(
            f"The Hopper kernel needs {-(-needed >> 10)} KiB of shared memory for keys of {describe(k)} and values of "
            f"{describe(v)} at head size {shape_of(k)[5]}; there are {SHARED_BYTES >> 10}."
        )


def _bytes(sides) -> int:
    """Of shared memory."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for d in sides for x in d.scratch())


def _codebook_refusal(k: Format, v: Format, rotates: bool) -> str:
    """Why not, or nothing."""
    tokens = shape_of(k)[4]
    if not (isinstance(k, Codebook) and isinstance(v, Codebook)) or k.bits != v.bits:
        return "keys and values must both be codebooks of as many bits, so that their planes agree"
    if k.bits == 1:
        return "it decodes codebooks of 2, 3 and 4 bits"
    if (k.per, v.per) != ("channel", "token") or not rotates:
        return "keys are taken per channel and before RoPE, values per token"
    if tokens not in (128, 256):
        return f"blocks must have 128 or 256 tokens, not {tokens}"
    return ""


def _refusal(fmt: Format, name: str) -> str:
    """Why not, or nothing."""
    *_, tokens, channels = shape_of(fmt)
    if isinstance(fmt, Dense):
        return "head size 96 is not a multiple of its tiles" if channels == 96 else ""
    if not isinstance(fmt, Affine):
        return "there is no decoder for them yet"
    if fmt.bits == 3:
        return "3-bit codes straddle words"
    if tokens > MOST_COPIED:
        return f"their blocks have {tokens} tokens, and a copy takes {MOST_COPIED} at most"
    if fmt.along != ("tokens" if name == "keys" else "channels") and _size(fmt) != channels:
        return "keys are scaled per channel or per whole token, values per token"
    if fmt.dtype != "float16":
        return "scales must be float16"
    return ""


def _size(fmt: Affine) -> int:
    *_, tokens, channels = shape_of(fmt)
    return (tokens if fmt.along == "tokens" else channels) // fmt.scale.shape[-2]


def chunk_tokens(k: Format, v: Format, group: int) -> int:
    """Tokens that the kernel's loop takes at a time."""
    plan, _, _ = decoders(k, v, group)
    return plan.run * plan.tokens


def decoders(k: Format, v: Format, group: int) -> tuple:
    """The plan, keys and values of a storage, for their sizes."""
    return _codebooks(k, v, group, None, None) if isinstance(k, Codebook) else _decoders(k, v, group)


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

    if isinstance(k, Planes) and isinstance(v, Planes):
        return attend_in_part(q, k, v, layer, first, last, interpret=interpret, splits=splits)[0]
    if isinstance(k, Codebook):
        plan, keys, values = _codebooks(k, v, q.shape[2], layer, rotation, interpret)
    else:
        plan, keys, values = _decoders(k, v, q.shape[2], interpret)
    return gpu_skeleton.attend(plan, keys, values, k, v, q, layer, first, last, splits)


attend_in_part = gpu_planes.attend_in_part
run = gpu_planes.run


def _decoders(k: Any, v: Any, group: int, interpret: Any = None):
    from pallas_kernels.decode_attention import gpu_affine, gpu_dense, gpu_skeleton

    module = {Dense: gpu_dense, Affine: gpu_affine}
    rows = tuple(module[type(x)].word_rows(x) for x in (k, v))
    groups = 1
    if isinstance(k, Affine) and isinstance(v, Affine):
        # Of words of few bits a chunk would have more planes than registers and shared memory suffice for.
        *_, tokens, channels = shape_of(k)
        most = 2 if channels > 128 else 4 if group > 8 else 8
        planes, groups = tokens // min(rows), min(4, 64 // min(64, *rows))
        while groups > 1 and planes // groups * 2 <= most:
            groups //= 2
    plan = gpu_skeleton.plan(k, group, rows, interpret, groups)
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


def _codebooks(k: Codebook, v: Codebook, group: int, layer, rotation, interpret: Any = None):
    from pallas_kernels.decode_attention import gpu_codebook_keys, gpu_codebook_values

    plan = gpu_codebook_keys.plan(k, group, interpret)
    for shared in (True, False):  # tables in shared memory where there is room
        keys = gpu_codebook_keys.CodebookKeys(plan, k.bits, k.slots, layer, rotation, v.levels, shared)
        values = gpu_codebook_values.CodebookValues(plan, v.bits, v.slots, shared)
        if _bytes((keys, values)) <= SHARED_BYTES:
            break
    return plan, keys, values
