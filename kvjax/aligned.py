"""Attention that reads keys and values in part: the reference for AlignedKV (arXiv 2409.16546) and its budgets.

A query reads a sealed block at the levels that `kvjax.codecs.align` chooses, from magnitudes stored with the block.
XLA cannot skip loads, so here the planes that are not read are masked: the result is that of a kernel that skips, and
`kvjax.reads` counts what it would have touched. Keys: one level per kv head and channel of a block; values: one per kv
head and token; both the most precise that a query head of the group needs.

Order. Sinks, recent tokens and, with attention "exact", this call's tokens come first; then the blocks, oldest first.
A budget for values needs no pass of its own: while m and l are the maximum and the sum so far,

    p = exp(s - m_final) / l_final  <=  exp(s - m) / l,

so an online softmax never thinks too little of a token. The paper's criterion needs the result's size before it reads
the values: a first pass over the scores ends with m and l and, for each of 32 residues of the token's number, the best
score; the 32 tokens' first planes give the estimate; a second pass reads the values. Its exponents are those of float32
and do not end at float16's smallest, and its sum is over sealed tokens.

The queries of a long call choose by themselves, each as a decode step at its position would.

A decode step takes a kernel where there is one (`kvjax.aligned_blocks`), which decides for more at a time: it reads at
least as much, and its levels are what is counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import aligned_blocks, attention, fused, reads, striped
from kvjax.aligned_blocks import Rows
from kvjax.aligned_parts import Block, Recent, by_criterion, contract, dot, mix, to_rank
from kvjax.attention import Mode
from kvjax.cache import KVCache, Segment
from kvjax.codecs import align
from kvjax.codecs.planes import PlanesCodec
from kvjax.queries import NewTokens, Queries, in_window, rotate_tokens
from kvjax.softmax import EMPTY, Partial, merge, softmax_part
from kvjax.targets import split
from pallas_kernels.decode_attention.formats import Planes

RESIDUES = 32  # tokens of the paper's estimate


def attend(
    cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode
) -> tuple[Partial, jax.Array]:
    """What `attention.attend_layer` does, for a segment whose keys or values are read in part.

    Returns:
      everything the queries see, and `[B, n]` float32 what was read, in the order of `reads.FIELDS`.
    """
    return _Attention(cache, segment, layer, qs, new, mode).run()


def _own_runs(cache: KVCache, segment: Segment, layer: Any, qs: Queries, known: jax.Array) -> tuple[Partial, jax.Array]:
    """One query of each row over one device's sealed blocks, by a kernel that there is."""
    choice = fused.chosen(cache, segment)
    assert choice is not None
    name, k, v = choice
    assert isinstance(k, Planes) and isinstance(v, Planes)
    position = qs.position[:, 0]
    rows = Rows(qs.rotated[..., 0, :], *fused.seen(cache, position, striped.Stripe()), position, known[..., 0])
    part, counts = aligned_blocks.attend(k, v, segment, layer, rows, name, split(cache.target)[1])
    return Partial(part.acc[..., None, :], part.max[..., None], part.sum[..., None]), counts


class _Attention:
    """One layer's queries over one segment; holds what the steps below share."""

    def __init__(self, cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode):
        self.cache, self.segment, self.layer, self.qs, self.new, self.mode = cache, segment, layer, qs, new, mode
        self.k_codec: Any = segment.k_codec
        self.v_codec: Any = segment.v_codec
        self.k_params, self.v_params = (
            jax.tree.map(lambda p: p[layer], params) for params in (segment.k_params, segment.v_params)
        )
        self.counted = (qs.position < qs.total[:, None])[:, :, None]  # queries beyond a row's tokens read nothing
        self.recent = Recent(self)

    def run(self) -> tuple[Partial, jax.Array]:
        part = attention.sinks_partial(self.cache, self.segment, self.layer, self.qs, self.new, self.mode)
        if self.mode == "exact":
            part = merge(part, attention.this_call(self.cache, self.qs, self.new))
        part = merge(part, self.recent.exact_part())
        if self.qs.raw.shape[3] == 1 and fused.chosen(self.cache, self.segment):
            known = jnp.where(part.sum > 0, part.max + jnp.log(jnp.maximum(part.sum, 1e-30)), EMPTY)
            sealed, counts = striped.attend_in_part(_own_runs, self.cache, self.segment, self.layer, self.qs, known)
            return merge(part, sealed), jnp.where(self.counted[:, 0], counts, 0.0)
        self.k_extent = self._running("k", self.k_codec)
        self.v_extent = self._running("v", self.v_codec)
        self.largest = self._largest()
        counts = self._count_running()
        if not by_criterion(self.v_codec):
            return self._blocks(self._online, (part, counts))
        first = (part.max, part.sum, counts, *self._no_candidates())
        top, total, counts, best, token = self._blocks(self._first_pass, first)
        self.final, (self.estimate, estimate_counts) = (top, total), self._estimate(top, total, best, token)
        acc = part.acc * jnp.exp(part.max - top)[..., None]
        acc, counts = self._blocks(self._second_pass, (acc, counts + estimate_counts))
        return Partial(acc, top, total), counts

    # Blocks

    def _blocks(self, body: Callable, carry: Any, sides: str = "kv") -> Any:
        """Folds `body(block, carry)` over the sealed blocks that some row sees, then those of this call."""
        cache = self.cache
        first = jnp.int32(0)
        if cache.shape.sliding_window is not None:
            oldest = self.qs.position.min(1) - cache.shape.sliding_window + 1 - cache.sinks
            first = jnp.maximum(oldest, 0).min() // cache.block
        last = cache.sealed(cache.length).max()
        carry = jax.lax.fori_loop(first, last, lambda n, c: body(self._sealed_block(n, sides), c), carry)
        return jax.lax.fori_loop(0, self.recent.blocks, lambda n, c: body(self.recent.block(n, sides), c), carry)

    def _sealed_block(self, n: jax.Array, sides: str) -> Block:
        def take(leaf: jax.Array) -> jax.Array:
            at = (self.layer, 0, n) + (0,) * (leaf.ndim - 3)
            return jax.lax.dynamic_slice(leaf, at, (1, leaf.shape[1], 1, *leaf.shape[3:]))[0, :, 0]

        cache, T = self.cache, self.cache.block
        token = cache.sinks + n * T + jnp.arange(T, dtype=jnp.int32)
        seen = in_window(cache.shape, self.qs.position[:, :, None], token[None, None])
        seen = seen & (n < cache.sealed(cache.length))[:, None, None]
        return Block(
            self.k_codec.unpack(jax.tree.map(take, self.segment.k)) if "k" in sides else None,
            self.v_codec.unpack(jax.tree.map(take, self.segment.v)) if "v" in sides else None,
            jnp.broadcast_to(n * T, (cache.batch,)),
            seen,
            seen,
            seen,
        )

    def _running(self, name: str, codec: Any) -> Any:
        """The largest extent of all that each query sees as stored, leaves `[B, S, ...]`; None for a block's."""
        if not codec.reads_in_part or codec.read.scope == "block":
            return None
        return self._fold(name, codec.extent)

    def _largest(self) -> Any:
        """The largest value each query sees as stored, `[B, K, S]`: the unit of the values' budget."""
        codec = self.v_codec
        if not codec.reads_in_part or by_criterion(codec):
            return None

        def largest(block: Any) -> jax.Array:
            size = codec.errors(codec.extent(block))[0]
            return jnp.where(jnp.isfinite(size), size, 0.0).max(-1)

        return self._fold("v", largest).swapaxes(1, 2)

    def _fold(self, name: str, measure: Callable) -> Any:
        """Maximum over blocks of `measure(block)`, leaves `[B, ...]` to `[B, S, ...]`, where a query sees one stored.

        A kernel would keep these in the cache; here they come from the blocks' metadata.
        """

        def body(block: Block, carry: Any) -> Any:
            seen = getattr(block, f"{name}_stored").any(-1)

            def larger(now: jax.Array, m: jax.Array) -> jax.Array:
                return jnp.maximum(now, jnp.where(to_rank(seen, m.ndim + 1), m[:, None], 0).astype(now.dtype))

            return jax.tree.map(larger, carry, measure(getattr(block, name)))

        one = jax.eval_shape(lambda: measure(getattr(self._sealed_block(jnp.int32(0), name), name)))
        B, S = self.qs.position.shape
        return self._blocks(body, jax.tree.map(lambda m: jnp.zeros((B, S, *m.shape[1:]), m.dtype), one), name)

    # Scores and keys

    def _scores(self, block: Block, counts: Any = None) -> tuple[jax.Array, Any]:
        """Scores `[B, K, G, S, T]`, and the counts with what was read of the keys."""
        q, codec, level = self.qs.rotated, self.k_codec, None
        if codec.reads_in_part:
            level = self._key_levels(block)
            scores = contract("bkgsh,bkth->bkgst", q, codec, block.k, level, -2)
        else:
            k = codec.dequantize(block.k, self.k_params).astype(self.cache.dtype)
            position = self.cache.sinks + block.start[:, None] + jnp.arange(k.shape[2], dtype=jnp.int32)[None]
            scores = dot(q, self.rotate(k, position))
        if block.k_exact is not None:
            scores = jnp.where(block.k_stored[:, None, None], scores, dot(q, block.k_exact))
        if counts is not None:
            # What is read entirely is counted along with its other half.
            tokens = ((block.v_stored if level is None else block.k_stored) & self.counted).sum(-1)
            needed = jnp.broadcast_to(
                tokens[:, None, :, None], (*tokens.shape[:1], self.cache.shape.kv_heads, tokens.shape[1], q.shape[-1])
            )
            counts = counts.at[:, :3].add(self._count("k", level, needed, tokens))
        return scores, counts

    def rotate(self, k: jax.Array, position: jax.Array) -> jax.Array:
        """Keys `[B, K, t, H]` as the codec stores them, at `position[B, t]`: float32 after RoPE."""
        if self.k_codec.pre_rope:
            k = rotate_tokens(self.cache.shape, k, position, self.qs.total)
        return k.astype(jnp.float32)

    def _key_levels(self, block: Block) -> jax.Array:
        """`[B, K, S, H]`: of each channel, for all tokens of the block."""
        q, codec = self.qs.rotated, self.k_codec
        running = self.k_extent is not None

        def per_query(x: jax.Array) -> jax.Array:  # [B, S, K, H] or [B, K, H] to [B, K, 1, S or 1, H]
            return x.swapaxes(1, 2)[:, :, None] if running else x[:, :, None, None]

        extent = jax.tree.map(per_query, self.k_extent if running else codec.extent(block.k))
        if codec.read.mode == "criterion":
            return align.align_addends(codec.read, q, extent).max(2)
        weight = jnp.abs(q)
        total, count = weight.sum(-1, keepdims=True), jnp.float32(q.shape[-1])
        budget = jnp.float32(codec.read.budget)
        return align.within_budget(codec.read, budget, weight, total, count, codec.errors(extent)).max(2)

    # Values

    def _online(self, block: Block, carry: tuple[Partial, jax.Array]) -> tuple[Partial, jax.Array]:
        """One step of the online softmax; the probabilities so far are upper bounds."""
        part, counts = carry
        scores, counts = self._scores(block, counts)
        p, top, total = softmax_part(scores, block.seen)
        now = jnp.maximum(part.max, top)
        p = p * jnp.exp(top - now)[..., None]
        total = part.sum * jnp.exp(part.max - now) + total * jnp.exp(top - now)
        acc = part.acc * jnp.exp(part.max - now)[..., None]
        acc, counts = self._values(block, p, p / jnp.maximum(total, 1e-30)[..., None], acc, counts)
        return Partial(acc, now, total), counts

    def _first_pass(self, block: Block, carry: tuple) -> tuple:
        """Maximum, sum and the best token of each residue, over the scores alone."""
        top, total, counts, best, token = carry
        scores, counts = self._scores(block, counts)
        _, here, here_total = softmax_part(scores, block.seen)
        now = jnp.maximum(top, here)
        total = total * jnp.exp(top - now) + here_total * jnp.exp(here - now)
        of_values = jnp.where(block.v_stored[:, None, None], scores, EMPTY)
        of_values = of_values.reshape(*scores.shape[:-1], -1, RESIDUES)
        row = of_values.argmax(-2).astype(jnp.int32)
        number = block.start[:, None, None, None, None] + row * RESIDUES + jnp.arange(RESIDUES)[None, None, None, None]
        here = of_values.max(-2)
        return now, total, counts, jnp.maximum(best, here), jnp.where(here > best, number, token)

    def _second_pass(self, block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, _ = self._scores(block)
        top, total = self.final
        p = jnp.where(block.seen[:, None, None], jnp.exp(scores - top[..., None]), 0.0)
        return self._values(block, p, p / jnp.maximum(total, 1e-30)[..., None], *carry)

    def _values(self, block: Block, p: jax.Array, probability: jax.Array, acc: jax.Array, counts: jax.Array) -> tuple:
        """Adds `p` times the block's values to `acc`; `probability` decides how precisely they are read."""
        codec, level = self.v_codec, None
        stored = jnp.where(block.v_stored[:, None, None], p, 0.0)
        if codec.reads_in_part:
            level = self._value_levels(block, probability)
            acc = acc + contract("bkgst,bkth->bkgsh", stored, codec, block.v, level, -1)
        else:
            v = codec.dequantize(block.v, self.v_params).astype(self.cache.dtype)
            acc = acc + mix(stored, v.astype(jnp.float32))
        if block.v_exact is not None:
            acc = acc + mix(p - stored, block.v_exact)
        seen = (block.k_stored if level is None else block.v_stored) & self.counted
        heads, head_dim = self.cache.shape.kv_heads, self.cache.shape.head_dim
        needed = jnp.broadcast_to(seen[:, None], (seen.shape[0], heads, *seen.shape[1:])).astype(jnp.int32) * head_dim
        return acc, counts.at[:, 3:].add(self._count("v", level, needed, seen.sum(-1)))

    def _value_levels(self, block: Block, probability: jax.Array) -> jax.Array:
        """`[B, K, S, T]`: of each token, for all channels."""
        codec = self.v_codec
        running = self.v_extent is not None

        def per_query(x: jax.Array) -> jax.Array:
            return x.swapaxes(1, 2)[:, :, None] if running else x[:, :, None, None]

        if by_criterion(codec):
            extent = per_query(self.v_extent if running else codec.extent(block.v))
            return align.align_result(codec.read, probability, self.estimate, extent).max(2)
        errors = tuple(e[:, :, None, None] for e in codec.errors(codec.extent(block.v)))
        count = (self.qs.position + 1).astype(jnp.float32)[:, None, None, :, None]  # at least the tokens seen
        budget = codec.read.budget * self.largest[:, :, None, :, None]
        one = jnp.float32(1)
        return align.within_budget(codec.read, budget, probability, one, count, errors).max(2)

    # The paper's estimate of the output

    def _no_candidates(self) -> tuple[jax.Array, jax.Array]:
        shape = (*self.qs.rotated.shape[:-1], RESIDUES)
        return jnp.full(shape, EMPTY), jnp.zeros(shape, jnp.int32)

    def _estimate(self, top: jax.Array, total: jax.Array, best: jax.Array, token: jax.Array) -> tuple:
        """The output's magnitude `[B, K, G, S, H]` by the first planes of a token per residue, and what was read."""
        cache, codec, T = self.cache, self.v_codec, self.cache.block
        assert isinstance(codec, PlanesCodec)  # codecs of integers have no criterion
        words = self.segment.v.planes[0]
        recent = codec.quantize(self.recent.v_exact).planes[0]
        sealed = cache.sealed(cache.length)[:, None, None, None]
        b, k = (jnp.arange(n).reshape(shape) for n, shape in zip(token.shape[:2], ((-1, 1, 1, 1), (1, -1, 1, 1))))

        def residue(i: jax.Array, carry: tuple) -> tuple:
            estimate, bits, unit_bits = carry
            at, score = token[..., i], best[..., i]
            found = score > EMPTY
            block = jnp.minimum(at // T, words.shape[2] - 1)
            first = codec.first_planes(words, (self.layer, b, block, k), at % T)
            fresh = jnp.clip(at - sealed * T, 0, recent.shape[2] - 1)
            first = jnp.where((at < sealed * T)[..., None], first, recent[b, k, fresh])
            p = jnp.where(found, jnp.exp(score - top) / jnp.maximum(total, 1e-30), 0.0)
            read = (found & self.counted[:, None, None, :, 0]).astype(jnp.float32)
            *_, rows, channels = words.shape
            units = reads.rows_unit_bits(k * rows + at % rows, 4 * channels)
            return (
                estimate + p[..., None] * codec.first_magnitude(first),
                bits + (8 * channels * read).sum((1, 2, 3)),
                unit_bits + (units * read).sum((1, 2, 3)),
            )

        none = jnp.zeros((cache.batch,), jnp.float32)
        estimate, bits, unit_bits = jax.lax.fori_loop(
            0, RESIDUES, residue, (jnp.zeros(self.qs.rotated.shape, jnp.float32), none, none)
        )
        zero = jnp.zeros_like(bits)
        return estimate, jnp.stack([zero, zero, zero, zero, bits, unit_bits], -1)

    # Counting

    def _count_running(self) -> jax.Array:
        """The counters `[B, n]` with running maxima, which each query reads once."""
        counts = jnp.zeros((self.cache.batch, len(reads.FIELDS)), jnp.float32)
        sealed = (self.cache.sealed(self.cache.length) > 0)[:, None]
        for extent, fresh, at in ((self.k_extent, self.recent.k_stored, 1), (self.v_extent, self.recent.v_stored, 4)):
            stored = sealed | fresh.any(-1)
            if extent is not None:
                bits = jnp.asarray(reads.whole_bits(extent, skip=2), jnp.float32)[None, :]
                queries = (self.counted[:, :, 0] & stored).sum(1, keepdims=True).astype(jnp.float32)
                counts = counts.at[:, at : at + 2].add(queries * bits)
        return counts

    def _count(self, name: str, level: Any, needed: jax.Array, tokens: jax.Array) -> jax.Array:
        """Elements, bits and unit bits `[B, 3]` of one block.

        Args:
          level: `[B, K, S, R]` of the block's rows (channels, or tokens); None for a codec that is read entirely.
          needed: `[B, K, S, R]` int, elements wanted of each row.
          tokens: `[B, S]` seen.
        """
        codec, shape = getattr(self, f"{name}_codec"), self.cache.shape
        storage = getattr(self.segment, name)
        seen = (tokens > 0).astype(jnp.float32)
        elements = tokens.astype(jnp.float32) * (shape.kv_heads * shape.head_dim)
        if level is None:
            whole, whole_units = reads.whole_bits(storage, skip=3)
            share = elements / (self.cache.block * shape.kv_heads * shape.head_dim)
            return jnp.stack([elements.sum(1), (share * whole).sum(1), (seen * whole_units).sum(1)], -1)
        level, needed = (x.swapaxes(1, 2) for x in (level, needed))
        row_bytes = [4 * plane.shape[-1] for plane in storage.planes]
        bits = reads.plane_bits(level, needed.astype(jnp.float32), codec.widths)
        unit_bits = reads.unit_bits(level, needed > 0, row_bytes, codec.rows_together)
        if getattr(self, f"{name}_extent") is None:
            meta_bits, meta_units = reads.whole_bits(dataclasses.replace(storage, planes=()), skip=3)
            bits, unit_bits = bits + seen * meta_bits, unit_bits + seen * meta_units
        return jnp.stack([elements.sum(1), bits.sum(1), unit_bits.sum(1)], -1)
