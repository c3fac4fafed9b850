"""Attention of one query per row and head over a compressed context: chooses an implementation.

An implementation raises NotImplementedError, with the reason in words, for what it does not do; nothing falls back
unless the caller asks for the next one by name.
"""

import importlib
import importlib.util
import os
from typing import Literal

import jax

from pallas_kernels.decode_attention import heads, reference
from pallas_kernels.decode_attention.formats import Format, Partial, Planes, Rotation, describe, joined_heads, shape_of

Implementation = Literal["reference", "numba_cpu", "xla_cpu", "mosaic_tpu", "mosaic_gpu"]


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    *,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None = None,
    implementation: Implementation = "reference",
    chip: str = "",
    interpret: object = False,
) -> Partial:
    """Attention of `q` over the tokens `first[b] <= t < last[b]` of layer `layer`.

    Args:
      q: `[B, K, G, H]` float32, times the softmax scale; after RoPE, or before it where `rotation` is given.
      k, v: storage with equal L, B, N, K, T and H; or with p heads side by side as one, K / p heads of p * H channels
        (`pallas_kernels.joined`; keys by halves where `rotation` is given).
      layer: int32 scalar.
      first, last: `[B]` int32, tokens of the storage; a row with `last <= first` sees nothing.
      rotation: for keys that are stored before RoPE.
      implementation: what computes it; "reference" is plain jnp and the definition.
      chip: generation within a platform ("v5e", "v5p", "v6e", "7x", "sm_90"); "" for the oldest supported.
      interpret: run a kernel in an interpreter (as `pl.pallas_call` or `plgpu.kernel` take it).

    Returns:
      Partial softmax sums in float32, to be merged with those of other tokens.

    Raises:
      NotImplementedError: where the implementation does not do this storage, shape or chip.
    """
    check(k, v, q.shape[2], implementation, chip, rotation is not None)
    group, joined = q.shape[2], joined_heads(k)
    if joined > 1:
        q = heads.joined_queries(q, joined, halves=rotation is not None)
        rotation = heads.joined_rotation(rotation, joined)
    if implementation == "reference":
        part = reference.decode_attention(q, k, v, layer, first, last, rotation)
    else:
        kernel = _module(implementation).decode_attention
        part = kernel(q, k, v, layer, first, last, rotation, chip=chip, interpret=interpret)
    return heads.separate_results(part, joined, group) if joined > 1 else part


def attend_in_part(
    q: jax.Array,
    k: Planes,
    v: Planes,
    *,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    implementation: Implementation = "reference",
    chip: str = "",
    interpret: object = False,
) -> tuple[Partial, jax.Array]:
    """As `decode_attention`, over storage that is read in part.

    Returns:
      The attention, and the levels `[B, U, K]` int32 to which values were read: 0 where no token of a run is seen.
    """
    check(k, v, q.shape[2], implementation, chip, False)
    if implementation == "reference":
        return reference.attend_in_part(q, k, v, layer, first, last)
    return _module(implementation).attend_in_part(q, k, v, layer, first, last, chip=chip, interpret=interpret)


def run(k: Format, implementation: Implementation) -> int:
    """Blocks of storage that the implementation reads to one level."""
    return 1 if implementation == "reference" else _module(implementation).run(k)


def check(k: Format, v: Format, group: int, implementation: Implementation, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, where the implementation does not do this; looks at shapes only.

    Args:
      group: query heads per kv head.
      rotates: keys are stored before RoPE.
    """
    if shape_of(k) != shape_of(v):
        raise ValueError(
            f"`v` is storage of {shape_of(v)} (L, B, N, K, T, H), but `k` of {shape_of(k)}; they must agree."
        )
    if joined_heads(k) != joined_heads(v):
        raise ValueError("`v` has another number of heads side by side than `k`; they must agree.")
    if implementation == "reference":
        return
    if implementation == "numba_cpu" and not installed(implementation):
        raise NotImplementedError("numba_cpu needs numba; install the extra `cpu`.")
    module = _module(implementation)
    for fmt in (k, v):
        if isinstance(fmt, Planes) and not hasattr(module, "attend_in_part"):
            raise NotImplementedError(f"{implementation} does not read {describe(fmt)}")
    module.check(k, v, group, chip, rotates)


def installed(implementation: Implementation) -> bool:
    """Whether the packages that an implementation needs are there, and a system that it is written for."""
    return implementation != "numba_cpu" or (os.name == "posix" and importlib.util.find_spec("numba") is not None)


def _module(implementation: str):
    # Imported on demand: the GPU kernels need a newer JAX than the rest, numba_cpu another package.
    return importlib.import_module(f"pallas_kernels.decode_attention.{implementation}")
