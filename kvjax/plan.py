"""What a cache of a given context would need on given devices, before anything is allocated.

    chip, devices = parse_devices("v5p:8")
    found = plan(model_config("llama-7b"), "kvquant2-dense", 10_000_000, chip, devices)
    found.parts, found.fits, found.spare, found.times()

Bytes are those of the arrays that `decode.init_cache` would make and of the weights, made abstract and split by the
rules of `kvjax.sharding`; padding as XLA lays them out (`kvjax.chips.tiled_bytes`). `scripts/confirm_plan.py` compares
them with what the real compilers say. Searches built on it are in `kvjax.plan_search`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax import decode, sharding
from kvjax.chips import Chip
from kvjax.evaluate.memory import abstract_cache
from kvjax.model.config import ModelConfig
from kvjax.model.llama import weight_shapes
from kvjax.model.rope import make_rope
from kvjax.policy import preset

# Parts of a device's memory, in the order of reports.
PARTS = ("codes", "metadata", "outliers", "recent", "sinks", "tables", "weights", "temporaries")
# Fields of storage that are not metadata of codes (scales, zeros, ranges, exponents).
_CODES, _OUTLIERS = ("codes", "values", "planes"), ("slot_channel", "slot_residual")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per decode step at the limits of the hardware; all rows make a token in it.

    Attributes:
      memory: to read weights and cache once.
      compute: for the products with them.
      interconnect: for the bytes of all-reduces.
      latency: of the all-reduces, estimated.
    """

    memory: float
    compute: float
    interconnect: float
    latency: float

    @property
    def total(self) -> float:
        """Memory and arithmetic overlap; what is sent waits for both."""
        return max(self.memory, self.compute) + self.interconnect + self.latency


@dataclasses.dataclass(frozen=True)
class Plan:
    """One preset at one context on one mesh. Bytes are of one device, the fullest; they hold `capacity` tokens a row.

    Attributes:
      quant, tokens, batch: as asked.
      capacity: tokens per row that the cache takes, `tokens` rounded up to blocks for every device of `seq`.
      chip, mesh: `mesh` has the sizes of `kvjax.sharding.AXES`.
      bits_per_element: of sealed storage.
      parts: bytes by `PARTS`; temporaries are an estimate (`temporary_bytes`), the rest is counted.
      nbytes: of the whole cache, over all devices, without padding and copies.
      read: bytes that a device reads in a decode step at `tokens` tokens.
      flops: multiplications and additions of a device in that step.
      sent: number and bytes of the all-reduces in that step, by the mesh axis that they run over.
      path: how attention is computed (`decode.explain`).
    """

    quant: str
    tokens: int
    batch: int
    capacity: int
    chip: Chip
    mesh: Mapping[str, int]
    bits_per_element: float
    parts: Mapping[str, int]
    nbytes: int
    read: int
    flops: float
    sent: Mapping[str, tuple[int, int]]
    path: str

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def spare(self) -> int:
        """Bytes left on a device; negative where it does not fit."""
        return self.chip.memory - self.needed

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    def times(self) -> Times:
        wire = latency = 0.0
        for axis, (count, nbytes) in self.sent.items():
            n = self.mesh[axis]
            wire += 2 * (n - 1) / n * nbytes / self.chip.interconnect  # reduce-scatter and all-gather of a ring
            latency += count * self.chip.latency(n)
        return Times(self.read / self.chip.bandwidth, self.flops / self.chip.flops, wire, latency)


def plan(
    config: ModelConfig,
    quant: str,
    tokens: int,
    chip: Chip,
    devices: int,
    *,
    batch: int = 1,
    mesh: Mapping[str, int] | None = None,
    dtype: Any = jnp.bfloat16,
) -> Plan:
    """The plan of one preset.

    Args:
      config: of the model.
      quant: a preset's name.
      tokens: per row.
      mesh: sizes of `data`, `seq` and `tensor`; None for the one of `devices` devices that decodes fastest by the
        limits, among those that fit; the one that needs least where none does.
      dtype: of weights, recent tokens and sinks.

    Raises:
      ValueError: where the preset does not fit the model, or a mesh does not divide it.
      NotImplementedError: where the method cannot be spread so.
    """
    if tokens < 1 or batch < 1 or devices < 1:
        raise ValueError(f"`tokens={tokens}`, `batch={batch}` and `devices={devices}` must all be at least 1.")
    if preset(quant).budget is not None:
        raise ValueError(
            f"`quant={quant}` finds its bits by measuring a model's weights, which a plan does not have; "
            "use a preset of given bits, such as kivi2 or asymkv-16-0."
        )
    if mesh is not None:
        return _on_mesh(config, quant, tokens, chip, batch, dtype, dict(mesh))
    found, refused = [], None
    for sizes in meshes(config, devices, batch):
        try:
            found.append(_on_mesh(config, quant, tokens, chip, batch, dtype, sizes))
        except NotImplementedError as error:  # a method that cannot be spread over `seq`
            refused = error
    if refused is not None and not found:
        raise refused
    return min(found, key=lambda p: (not p.fits, p.times().total if p.fits else p.needed))


def meshes(config: ModelConfig, devices: int, batch: int) -> Iterator[dict[str, int]]:
    """The meshes of so many devices that divide the model and the batch evenly."""
    shared = math.gcd(config.kv_heads, config.mlp_width, config.vocab)
    for data in _divisors(math.gcd(batch, devices)):
        for tensor in _divisors(math.gcd(shared, devices // data)):
            yield {"data": data, "seq": devices // data // tensor, "tensor": tensor}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices: it says how arrays are split."""
    axes = sharding.AXES
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in axes), axes, axis_types=(AxisType.Auto,) * len(axes))


@functools.lru_cache(maxsize=256)
def _abstract(config: ModelConfig, quant: str, tokens: int, target: str, batch: int, dtype: Any, mesh: Any) -> Any:
    shape = decode.CacheShape(
        config.layers, config.q_heads, config.kv_heads, config.head_dim, make_rope(config.head_dim, 4096),
        config.sliding_window,
    )  # fmt: skip
    return abstract_cache(quant, preset(quant), shape, tokens, dtype, batch=batch, target=target, mesh=mesh)


def _on_mesh(
    config: ModelConfig, quant: str, tokens: int, chip: Chip, batch: int, dtype: Any, sizes: dict[str, int]
) -> Plan:
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    mesh: Any = abstract_mesh(sizes)  # takes the place of a Mesh: it is asked for names and sizes only
    cache = _abstract(config, quant, tokens, chip.target, batch, jnp.dtype(dtype), mesh)
    weights = sharding.model_shardings(config, mesh)
    state = {n: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for n, s in weight_shapes(config).items()}
    weight_bytes = {n: _local_bytes(chip, x, weights[n].spec, mesh) for n, x in state.items()}
    parts = _cache_parts(cache, chip, mesh) | {"weights": sum(weight_bytes.values())}
    parts["temporaries"] = temporary_bytes(config, cache, sizes)
    sealed = max(tokens - cache.sinks - cache.window, 0) // cache.block
    whole = cache.capacity - cache.sinks - cache.window
    share = min(sealed * cache.block, config.sliding_window or tokens) / whole
    in_blocks = sum(parts[part] for part in ("codes", "metadata", "outliers"))
    rest = sum(parts[part] for part in ("recent", "sinks", "tables"))
    # A step looks up one row of the embedding; a tied one is read as the head.
    lookup = 0 if config.tie_embeddings else weight_bytes["embedding"]
    return Plan(
        quant=quant,
        tokens=tokens,
        batch=batch,
        capacity=cache.capacity,
        chip=chip,
        mesh=sizes,
        bits_per_element=decode.bits_per_element(cache),
        parts={part: parts[part] for part in PARTS},
        nbytes=decode.nbytes(cache),
        read=round(in_blocks * share) + rest + parts["weights"] - lookup,
        flops=_flops(config, min(tokens, config.sliding_window or tokens), batch, sizes),
        sent=_sent(config, cache, sizes),
        path=decode.explain(cache),
    )


def _cache_parts(cache: decode.KVCache, chip: Chip, mesh: AbstractMesh) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    specs = jax.tree.leaves(sharding.cache_specs(cache), is_leaf=lambda x: isinstance(x, P))
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(cache), specs, strict=True):
        parts[_part([getattr(key, "name", "") for key in path])] += _local_bytes(chip, leaf, spec, mesh)
    return parts


def _part(names: Iterable[str]) -> str:
    """The part of memory that a leaf of a cache belongs to, by the attributes that lead to it."""
    names = set(names)
    if names & {"k", "v"}:
        return "codes" if names & set(_CODES) else "outliers" if names & set(_OUTLIERS) else "metadata"
    if names & {"k_sinks", "v_sinks"}:
        return "sinks"
    return "recent" if names & {"k_recent", "v_recent", "pending"} else "tables"


def _local_bytes(chip: Chip, leaf: Any, spec: P, mesh: AbstractMesh) -> int:
    """Bytes of one device's share of an array."""
    shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    return chip.nbytes(shape, jnp.dtype(leaf.dtype).itemsize)


def temporary_bytes(config: ModelConfig, cache: decode.KVCache, sizes: Mapping[str, int]) -> int:
    """Of a decode step on one device, roughly: it does not depend on the context.

    One layer's recent keys and values in float32, exact and as stored; the new keys and values of all layers; logits.
    """
    rows, heads = cache.batch // sizes["data"], config.kv_heads // sizes["tensor"]
    ring = cache.segments[0].k_recent.shape[3]
    recent = 4 * rows * heads * ring * config.head_dim * 4
    new = 2 * config.layers * rows * heads * config.head_dim * cache.dtype.itemsize
    return recent + new + cache.batch * config.vocab * 4


def _flops(config: ModelConfig, visible: int, batch: int, sizes: Mapping[str, int]) -> float:
    """Multiplications and additions of one device: weights once per row, attention over the tokens it holds."""
    rows = batch / sizes["data"]
    matrices = sum(math.prod(shape) for name, shape in weight_shapes(config).items() if name != "embedding")
    if config.tie_embeddings:
        matrices += config.vocab * config.width
    attention = 2 * config.layers * config.q_heads * config.head_dim * visible / sizes["seq"]
    return 2 * rows * (matrices + attention) / sizes["tensor"]


def _sent(config: ModelConfig, cache: decode.KVCache, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """All-reduces of a step that seals no block, by mesh axis; `scripts/confirm_plan.py` counts them in real programs.

    Over `seq`, in each layer: the maximum of the scores, and the sums. Over `tensor`: in each layer the output and the
    down projection and what a codec that all heads share takes of its ring of recent tokens; the embedding's row.
    """
    width = cache.dtype.itemsize
    rows = cache.batch // sizes["data"]
    sent = {}
    if sizes["seq"] > 1:
        one = rows * config.q_heads // sizes["tensor"] * (config.head_dim + 2) * 4
        sent["seq"] = (2 * config.layers, config.layers * one)
    if sizes["tensor"] > 1:
        shared = sum(segment.layers * _over_heads(segment) for segment in cache.segments)
        ring = cache.segments[0].k_recent.shape[3]
        products = 2 * config.layers + 1
        sent["tensor"] = (products + shared, rows * (products * config.width * width + shared * ring * 4))
    return sent


def _over_heads(segment: Any) -> int:
    """All-reduces of encoding what spread heads share: a token's range, and its mean where it has slots."""
    found = 0
    for storage in (segment.k, segment.v):
        scale = getattr(storage, "scale", None)
        if scale is not None and scale.shape[3] == 1:
            found += 4 if getattr(storage, "slot_channel", None) is not None else 2
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
