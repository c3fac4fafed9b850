"""A decode step over planes by a kernel, which reads a run of blocks of one kv head to one level.

The rules are those of `kvjax.codecs.align`, decided for a run and not for a channel (keys) or a token (values): the
level is the highest that one of them needs, so that at least what the rule wants is read, and the error is within it.

Keys. A budget's levels follow from the query and the largest magnitude of each channel in the run. By the paper's
criterion the channel with the largest product is read in full, and with it every run.

Values. The rules ask for probabilities, which a kernel learns on the way; sinks and recent tokens come first, so that
it knows their share. Both budgets allow less the larger a probability w is, so each level suffices up to a limit:

    worst   w e <= tau (1/N + w) / 2               w <= tau / 2N / (e - tau/2), any w where e <= tau/2
    rms     w^2 e^2 / 3 <= tau^2 (1/N + w) / 18    w <= (tau^2 + sqrt(tau^4 + 24 e^2 tau^2 / N)) / 12 e^2

The paper's criterion asks for the output's size before the values are read: a pass over all keys more, at 16 bits, to
leave at most 8 bits of values. So they are read in full, which it allows too.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax import reads
from kvjax.aligned_parts import by_criterion
from kvjax.cache import Segment
from kvjax.codecs import align
from kvjax.codecs.planes import EXPONENTS
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention.formats import Partial, Planes, shape_of

_MARGIN = 1e-4  # of log-probabilities: a kernel's rounding must not lower a level


class Rows(NamedTuple):
    """What one query of each row sees.

    Attributes:
      q: `[B, K, G, H]` after RoPE, times the softmax scale.
      first, last: `[B]` int32, tokens of the sealed blocks.
      position: `[B]` int32, of the query.
      known: `[B, K, G]` float32, the log-sum-exp of its scores of all other tokens.
    """

    q: jax.Array
    first: jax.Array
    last: jax.Array
    position: jax.Array
    known: jax.Array


def attend(
    k: Planes, v: Planes, segment: Segment, layer: Any, rows: Rows, name: api.Implementation, chip: str
) -> tuple[Partial, jax.Array]:
    """Attention to the sealed blocks of a layer.

    Args:
      k, v: the segment's keys and values as the kernel `name` reads them; what it shall read of them is decided here.

    Returns:
      The attention, and `[B, n]` float32 what was read, in the order of `reads.FIELDS`.
    """
    runs = _Runs(rows, k)
    key_extent = runs.extent(segment.k_codec, segment.k, layer)
    value_extent = runs.extent(segment.v_codec, segment.v, layer)
    everything = jnp.full(runs.tokens.shape + rows.q.shape[1:2], len(k.planes), jnp.int32)
    if key_extent is None:
        k = dataclasses.replace(k, levels=everything)
    else:
        k = dataclasses.replace(k, levels=key_levels(segment.k_codec, rows.q, key_extent))
    if value_extent is None:
        v = dataclasses.replace(v, levels=everything)
    else:
        value_extent = jax.tree.map(lambda x: x.max(-1), value_extent)
        limits = value_limits(segment.v_codec, value_extent, rows.position + 1)
        v = dataclasses.replace(v, limits=limits, known=rows.known)
    partial, value_levels = api.attend_in_part(
        rows.q,
        k,
        v,
        layer=jnp.asarray(layer, jnp.int32),
        first=rows.first,
        last=rows.last,
        implementation=name,
        chip=chip,
    )
    sides = (
        (segment.k_codec, segment.k, k.levels, key_extent is not None),
        (segment.v_codec, segment.v, value_levels, value_extent is not None),
    )
    return partial, jnp.concatenate([runs.counts(*side) for side in sides], -1)


def key_levels(codec: Any, q: jax.Array, extent: jax.Array) -> jax.Array:
    """Planes to read of each run's keys, by a budget.

    A larger channel needs no fewer planes, so for each plane there is an exponent from which on the channel needs it.
    What is as large as the context is only compared with that, one byte with another.

    Args:
      codec: a `PlanesCodec`.
      q: `[B, K, G, H]` as scored, times the softmax scale.
      extent: uint8 `[B, U, K, H]`, the largest exponent of each run.

    Returns:
      int32 `[B, U, K]`.
    """
    weight = jnp.abs(q)[..., None]
    errors = codec.errors(jnp.arange(EXPONENTS, dtype=jnp.uint8).reshape(1, 1, 1, 1, EXPONENTS))
    total, count, budget = weight.sum(-2, keepdims=True), jnp.float32(q.shape[-1]), jnp.float32(codec.read.budget)
    level = align.within_budget(codec.read, budget, weight, total, count, errors).max(2)
    needed = jnp.zeros(extent.shape[:-1], jnp.int32)
    for i in range(1, len(errors) + 1):
        least = (level < i).sum(-1, dtype=jnp.uint8)[:, None]  # exponent at which plane i is needed, `[B, 1, K, H]`
        needed = needed + (extent >= least).any(-1).astype(jnp.int32)
    return needed


def value_limits(codec: Any, extent: Any, count: jax.Array) -> jax.Array:
    """Log-probabilities up to which each level suffices for a run's values, by a budget.

    Args:
      extent: leaves `[B, U, K]`, the largest of each run; 0 where it holds nothing that is seen.
      count: `[B]`, at least the number of tokens seen.

    Returns:
      float32 `[planes, B, U, K]`: the level is the number of limits below the largest log-probability.
    """
    rule = codec.read
    nothing, *errors = codec.errors(extent)
    # The budget's unit is the largest value; a run with infinities and NaN has none and is read in full.
    tau = rule.budget * jnp.where(jnp.isfinite(nothing), nothing, 0.0).max(1, keepdims=True)
    each = 1.0 / count.astype(jnp.float32)[:, None, None]
    if not rule.skip:
        limits = [jnp.zeros_like(nothing)]
    else:
        limits = [_worst(tau * (1.0 if rule.mode == "worst" else 0.25), each, nothing)]
    if rule.mode == "worst":
        limits += [_worst(tau, each, error) for error in errors]
    else:
        limits += [_rms(tau * (0.75 if rule.skip else 1.0), each, error) for error in errors]
    return jnp.log(jnp.stack(limits)) - _MARGIN


def _worst(tau: jax.Array, each: jax.Array, error: jax.Array) -> jax.Array:
    beyond = error - tau / 2
    return jnp.where(beyond > 0, tau * each / 2 / jnp.maximum(beyond, 1e-30), jnp.inf)


def _rms(tau: jax.Array, each: jax.Array, error: jax.Array) -> jax.Array:
    """The larger root, with the unit x = tau / error: none of the squares overflows."""
    x = tau / error
    return x * (x + jnp.sqrt(x * x + 24.0 * each)) / 12.0


class _Runs:
    """The runs of a layer's blocks, and what of them is seen: `tokens[B, U]`."""

    def __init__(self, rows: Rows, k: Planes):
        self.rows, self.run = rows, k.run
        *_, self.blocks, _, self.block, _ = shape_of(k)
        start = jnp.arange(-(-self.blocks // self.run), dtype=jnp.int32)[None] * (self.run * self.block)
        stop = jnp.minimum(start + self.run * self.block, rows.last[:, None])
        self.tokens = jnp.maximum(stop - jnp.maximum(start, rows.first[:, None]), 0)

    def extent(self, codec: Any, storage: Any, layer: Any) -> Any:
        """The largest extent in each run, leaves `[B, U, K, ...]`; None where the codec's rule has no use for it."""
        if by_criterion(codec):
            return None
        stored = jax.tree.map(functools.partial(self._one_layer, layer), storage)
        extent = jax.tree.map(self._largest, codec.extent(codec.unpack(stored)))
        if codec.along == "tokens" and codec.read.scope == "running":
            extent = jax.tree.map(lambda x: jnp.broadcast_to(x.max(1, keepdims=True), x.shape), extent)
        return extent

    def _one_layer(self, layer: Any, leaf: jax.Array) -> jax.Array:
        if self.run > 1:
            return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        # On GPU, of a slice with an axis of size 1 XLA makes up where it lies, and copies the array to be like that.
        _, batch, blocks, *rest = leaf.shape
        flat = leaf.reshape(-1, *rest)
        return jax.lax.dynamic_slice_in_dim(flat, layer * (batch * blocks), batch * blocks).reshape(leaf.shape[1:])

    def _largest(self, x: jax.Array) -> jax.Array:
        """`x[B, N, ...]` >= 0 to `[B, U, ...]`, of the blocks that are seen."""
        start = jnp.arange(self.blocks, dtype=jnp.int32)[None] * self.block
        seen = (start < self.rows.last[:, None]) & (start + self.block > self.rows.first[:, None])
        x = jnp.where(seen.reshape(seen.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        if self.run == 1:
            return x
        x = jnp.pad(x, [(0, 0), (0, -self.blocks % self.run)] + [(0, 0)] * (x.ndim - 2))
        # Not a reshape to `[B, U, run, ...]`: on TPU it would be a temporary of 16 times the size.
        window = (1, self.run) + (1,) * (x.ndim - 2)
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.max, window, window, "VALID")

    def counts(self, codec: Any, storage: Any, levels: jax.Array, metadata: bool) -> jax.Array:
        """Elements, bits and unit bits `[B, 3]` of keys or values.

        A kernel copies a run whole, tokens that are not seen included, and rules look at the metadata of all blocks:
        that is in the unit bits.

        Args:
          levels: `[B, U, K]` read.
          metadata: it was read.
        """
        _, heads, _, channels = self.rows.q.shape
        tokens = self.tokens.astype(jnp.float32)
        width = jnp.asarray(codec.widths, jnp.float32)[levels].sum(-1) * channels
        bits = (tokens * width).sum(1)
        copied = (jnp.where(self.tokens > 0, width, 0.0) * (self.run * self.block)).sum(1)
        if metadata:
            beside = dataclasses.replace(storage, planes=())
            bits = bits + -(-tokens // self.block).sum(1) * reads.whole_bits(beside, skip=3)[0]
            copied = copied + reads.whole_bits(beside, skip=2)[1]
        return jnp.stack([tokens.sum(1) * (heads * channels), bits, copied], -1)
