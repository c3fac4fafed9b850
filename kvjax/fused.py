"""Fused attention of a decode step over sealed blocks: which kernel reads a segment's storage, and with what.

Kernels (`pallas_kernels.decode_attention`) read packed words and know no codecs; here a codec's block becomes what they
read. What has no kernel takes the chunked reference of `kvjax.attention`, and `explain` says so and why.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import KVCache, Segment
from kvjax.codecs.affine import AffineBlock, AffineCodec
from kvjax.codecs.base import AbstractCodec
from kvjax.codecs.identity import DenseBlock, IdentityCodec
from kvjax.codecs.joined import JoinedCodec, can_join
from kvjax.codecs.joined import inner as unjoined
from kvjax.codecs.kvquant import NUQBlock, NUQChannelCodec, NUQTokenCodec
from kvjax.codecs.planes import AlignedCodec, PlanesBlock, PlanesCodec
from kvjax.codecs.rotated import RotatedCodec
from kvjax.model.rope import cos_sin
from kvjax.striped import Stripe
from kvjax.targets import split
from pallas_kernels import joined, packing
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention.formats import (
    Affine,
    Codebook,
    Dense,
    Format,
    Partial,
    Planes,
    Rotation,
    shape_of,
)

# Tokens of capacity from which attention on CPU is compiled by numba, where that is installed: it takes some seconds to
# compile, which short contexts do not give back.
NATIVE_TOKENS = 4096

# (storage type, platform) -> implementation; the kernel's own `check` has the last word on shapes and chips.
_KERNELS: dict[str, api.Implementation] = {"cpu": "xla_cpu", "gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
FAST: dict[tuple[type, str], api.Implementation] = {
    (block, platform): name
    for block in (DenseBlock, AffineBlock, NUQBlock, PlanesBlock)
    for platform, name in _KERNELS.items()
}


def kernel_format(codec: AbstractCodec, storage: Any, params: Any, layers: int) -> Format:
    """A segment's keys or values as kernels read them; no array is touched.

    Raises:
      NotImplementedError: for storage that no kernel reads.
    """
    if isinstance(codec, JoinedCodec):
        fmt = kernel_format(codec.inner, storage, _joined_constants(codec, params), layers)
        assert not isinstance(fmt, Planes)
        return dataclasses.replace(fmt, joined=codec.heads)
    if isinstance(codec, RotatedCodec):
        if codec.pre_rope:
            raise NotImplementedError("a Hadamard rotation before RoPE cannot be folded into the query")
        return kernel_format(codec.inner, storage, params, layers)
    if isinstance(codec, IdentityCodec):
        if codec.dtype == "float32":
            raise NotImplementedError("kernels read 16-bit values, not float32")
        return Dense(storage.values, codec.dtype)  # type: ignore[arg-type]
    if isinstance(codec, AffineCodec):
        if codec.meta == "int8":
            raise NotImplementedError("kernels read 16-bit scales and zeros, not 8-bit ones")
        return Affine(storage.codes, storage.scale, storage.zero, codec.bits, codec.along, codec.meta)
    if isinstance(codec, (NUQChannelCodec, NUQTokenCodec)):
        return _codebook(codec, storage, params, layers)
    if isinstance(codec, PlanesCodec):
        return Planes(storage.planes, order="channels" if codec.along == "tokens" else "words")
    raise NotImplementedError(f"no kernel reads {type(storage).__name__}")


def _codebook(codec: NUQChannelCodec | NUQTokenCodec, block: NUQBlock, params: Any, layers: int) -> Codebook:
    levels = codec.levels(params)[1]
    if levels.ndim == 1:
        levels = jnp.broadcast_to(levels, (layers, *levels.shape))
    slots = block.slot_channel, block.slot_residual
    if not isinstance(codec, NUQChannelCodec):
        return Codebook(block.codes, levels, block.scale, block.zero, *slots, codec.bits, "token")
    if codec.ranges != "offline":
        raise NotImplementedError("kernels read per-channel ranges that are fitted offline, not those of a block")
    return Codebook(block.codes, levels, params["scale"], params["zero"], *slots, codec.bits, "channel")


def _joined_constants(codec: JoinedCodec, params: Any) -> Any:
    if params is None:
        return None

    def joined_constant(x: Any) -> Any:
        return codec.join_constants(x) if isinstance(x, jax.Array) else jax.eval_shape(codec.join_constants, x)

    return {name: joined_constant(x) if name in ("scale", "zero") else x for name, x in params.items()}


def arranged(policy: Any, shape: Any, target: str, mesh: Any) -> Any:
    """The policy with codecs that keep heads side by side where the target wants that (`kvjax.codecs.joined`)."""
    heads = side_by_side(shape.head_dim, shape.kv_heads // (1 if mesh is None else mesh.shape["tensor"]), target)
    if heads == 1:
        return policy

    def arrange(codec: AbstractCodec) -> AbstractCodec:
        return JoinedCodec(codec, heads)

    segments = tuple(
        dataclasses.replace(part, k_codec=arrange(part.k_codec), v_codec=arrange(part.v_codec))
        if all(can_join(codec) for codec in (part.k_codec, part.v_codec))
        else part
        for part in policy.segments
    )
    return dataclasses.replace(policy, segments=segments)


def side_by_side(channels: int, kv_heads: int, target: str) -> int:
    """How many of a device's heads a cache for the target keeps side by side as one."""
    heads = joined.heads_to_join(channels)
    return heads if split(target)[0] == "tpu" and kv_heads % heads == 0 else 1


def block_tokens(policy: Any, target: str) -> int:
    """Tokens per block that suit the target."""
    if split(target)[0] != "tpu":
        return 128
    codecs = [getattr(c, "inner", c) for part in policy.segments for c in (part.k_codec, part.v_codec)]
    return packing.tpu_block_tokens(getattr(codec, "bits", None) for codec in codecs)


def formats(segment: Segment) -> tuple[Format, Format]:
    """Keys and values of a segment as kernels read them."""
    return (
        kernel_format(segment.k_codec, segment.k, segment.k_params, segment.layers),
        kernel_format(segment.v_codec, segment.v, segment.v_params, segment.layers),
    )


def implementation(cache: KVCache, segment: Segment, target: str | None = None) -> api.Implementation:
    """What computes a decode step's attention over the segment's sealed blocks on `target` (None: the cache's).

    Raises:
      NotImplementedError: where the chunked reference does, with the reason.
    """
    return _choose(cache, segment, target)[0]


def _choose(cache: KVCache, segment: Segment, target: str | None = None) -> tuple[api.Implementation, Format, Format]:
    """`implementation`, with the keys and values that it reads."""
    platform, chip = split(target or cache.target)
    if platform == "reference":
        raise NotImplementedError("asked for")
    name = FAST.get((type(segment.k), platform))
    if name is None:
        raise NotImplementedError(f"no kernel for {type(segment.k).__name__} on {platform}")
    if segment.k_codec.pre_rope and cache.shape.rope.dynamic is not None:
        raise NotImplementedError("dynamic RoPE turns every row by other angles")
    k, v = formats(segment)
    group = cache.shape.q_heads // cache.shape.kv_heads
    rotates = segment.k_codec.pre_rope
    if name == "xla_cpu" and cache.capacity >= NATIVE_TOKENS:
        try:
            api.check(k, v, group, "numba_cpu", chip, rotates)
            name = "numba_cpu"
        except NotImplementedError:
            pass  # without numba, and for what only XLA's kernel reads
    api.check(k, v, group, name, chip, rotates)
    if isinstance(k, Planes) or isinstance(v, Planes):
        k, v = _in_runs(cache, name, k, v)
    return name, k, v


def _in_runs(cache: KVCache, name: api.Implementation, k: Format, v: Format) -> tuple[Planes, Planes]:
    """Planes as the kernel takes them together, `[B, U, K]` levels still to be decided (`kvjax.aligned_blocks`)."""
    if not (isinstance(k, Planes) and isinstance(v, Planes)):
        raise NotImplementedError("kernels read keys and values in part together, or neither")
    if {cache.k_window or cache.block, cache.v_window or cache.block} != {cache.block}:
        raise NotImplementedError(
            f"windows of {cache.k_window} and {cache.v_window} tokens beside blocks of {cache.block}: a step would see "
            "recent tokens as stored"
        )
    run = api.run(k, name)
    return dataclasses.replace(k, run=run), dataclasses.replace(v, run=run)


def kernel(cache: KVCache, segment: Segment) -> Callable[..., Partial] | None:
    """What computes a decode step's attention over the segment on the cache's target; None where no kernel does.

    Returns:
      `(layer, raw, rotated, position, stripe) -> Partial`: raw, rotated `[B, K, G, H]` float32, the queries before and
      after RoPE, times 1/sqrt(H); position `[B]` int32; stripe says which blocks of the context the segment holds.
    """
    choice = chosen(cache, segment)
    return None if choice is None else functools.partial(_attend, *choice, cache, segment)


def chosen(cache: KVCache, segment: Segment) -> tuple[api.Implementation, Format, Format] | None:
    """The kernel for the segment on the cache's target, and the keys and values that it reads; None where none does."""
    try:
        return _choose(cache, segment)
    except NotImplementedError:
        return None


def seen(cache: KVCache, position: jax.Array, stripe: Stripe) -> tuple[jax.Array, jax.Array]:
    """The first sealed token of the stripe that a query at `position[B]` sees, and one past the last: `[B]` int32."""
    T, window = cache.block, cache.shape.sliding_window
    last = stripe.among(cache.sealed(cache.length)) * T
    if window is None:
        return jnp.zeros_like(last), last
    oldest = jnp.maximum(position - window + 1 - cache.sinks, 0)
    block = oldest // T
    return stripe.among(block) * T + jnp.where(block % stripe.count == stripe.index, oldest % T, 0), last


def _attend(
    name: api.Implementation,
    k: Format,
    v: Format,
    cache: KVCache,
    segment: Segment,
    layer: Any,
    raw: jax.Array,
    rotated: jax.Array,
    position: jax.Array,
    stripe: Stripe,
) -> Partial:
    shape, T = cache.shape, cache.block
    first, last = seen(cache, position, stripe)
    q, rotation = rotated, None
    if segment.k_codec.pre_rope:
        # The factor stands for those of query and key: the kernel's angles only turn.
        q = raw * jnp.float32(shape.rope.attention_factor**2)
        start = cache.sinks + stripe.index * T
        rotation = Rotation(position - start, lambda offsets: _turn(shape.rope, offsets), stripe.count)
    k_codec, v_codec = unjoined(segment.k_codec), unjoined(segment.v_codec)
    if isinstance(k_codec, RotatedCodec):
        q = k_codec.turn(q)
    part = api.decode_attention(
        q,
        k,
        v,
        layer=jnp.asarray(layer, jnp.int32),
        first=first,
        last=last,
        rotation=rotation,
        implementation=name,
        chip=split(cache.target)[1],
    )
    if isinstance(v_codec, RotatedCodec):
        part = part._replace(acc=v_codec.turn(part.acc))
    return part


def _turn(rope: Any, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    cos, sin = cos_sin(rope, offsets)
    return cos / rope.attention_factor, sin / rope.attention_factor


def explain(cache: KVCache, platform: str | None = None, strict: bool = False) -> str:
    """Which path each segment's attention takes, a line each, and why.

    Args:
      platform: a platform or a platform and chip ("tpu", "tpu:v5p", "gpu:sm_90"); None for what the cache was made for.
      strict: raise NotImplementedError where a decode step would take the reference.
    """
    lines, slow = [], []
    for segment in cache.segments:
        name = f"layer{'s' * (segment.layers > 1)} {_ranges(segment.layer_ids)}"
        what = f"keys {segment.k_codec.describe()}, values {segment.v_codec.describe()}"
        try:
            chosen_name, k, _ = _choose(cache, segment, platform)
            hint = _faster(cache, chosen_name)
            path = f"{chosen_name} in decode steps{_together(segment, k)}{hint}, reference (chunked jnp) in prefill"
        except NotImplementedError as reason:
            path = f"reference (chunked jnp), {reason}{_instead(cache, segment, platform)}"
            slow.append(f"{name}: {reason}")
        lines.append(f"{name}: {path}; {what}")
    if strict and slow:
        raise NotImplementedError(f"strict: the reference would run for {'; '.join(slow)}; drop `strict` to allow it.")
    return "\n".join(lines)


def _faster(cache: KVCache, name: api.Implementation) -> str:
    """What would make decode steps faster, where something is missing."""
    if name != "xla_cpu" or cache.capacity < NATIVE_TOKENS or api.installed("numba_cpu"):
        return ""
    return " (numba_cpu is faster: install the extra `cpu`)"


def _instead(cache: KVCache, segment: Segment, platform: str | None) -> str:
    """What would read planes on CPU, where it does not."""
    if split(platform or cache.target)[0] != "cpu" or not isinstance(segment.k, PlanesBlock):
        return ""
    if not api.installed("numba_cpu"):
        return " (numba_cpu does: install the extra `cpu`)"
    return f" (numba_cpu does, from {NATIVE_TOKENS:,} tokens of capacity)" if cache.capacity < NATIVE_TOKENS else ""


def _together(segment: Segment, k: Format) -> str:
    """What is read to one level, where a kernel reads planes; and of which side all of them."""
    if not isinstance(k, Planes):
        return ""
    whole = [
        name
        for name, codec in (("keys", segment.k_codec), ("values", segment.v_codec))
        if isinstance(codec, AlignedCodec) and codec.read.mode == "criterion"
    ]
    text = f" (levels by runs of {k.run * shape_of(k)[4]} tokens and kv head"
    return text + (f"; by the criterion that is all of the {' and '.join(whole)})" if whole else ")")


def _ranges(ids: tuple[int, ...]) -> str:
    """Ascending integers in words: "0 to 3, 7, 9 to 11"."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends))
