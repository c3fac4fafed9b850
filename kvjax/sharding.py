"""Where arrays live on a mesh of devices.

A mesh has three axes, any of them 1:

    data     rows of the batch
    seq      blocks of the context (context parallelism)
    tensor   kv heads with their query heads, MLP channels, vocabulary (tensor parallelism)

All axes are `Auto`: XLA partitions what `RULES` leave open. Where sealed blocks are read or written each device works
on its own (`kvjax.striped`). Recent tokens and sinks are whole on every device of `seq`: they are a few hundred tokens,
and reading them costs less than one more message.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from kvjax.cache import KVCache, Segment

AXES = ("data", "seq", "tensor")

# For every kind of array, what its leading axes are split over. Axes of size 1 and the others are whole everywhere.
RULES: dict[str, P] = {
    "sealed": P(None, "data", "seq", "tensor"),  # [L, B, N, K or 1, ...]
    "blocks": P(None, "data", None, "tensor"),  # [L, B, n, K or 1, ...]: some blocks, whole on every device of `seq`
    "recent": P(None, "data", "tensor"),  # [L, B, K, R, H]: sinks and pending tokens too; `dropped` is [L, B, K]
    "counters": P(None, "data"),  # [L, B, n]: what was read
    "rows": P("data"),  # [B, ...]: lengths
    "heads": P(None, "tensor"),  # [L, K, 1, H]: fitted constants of each channel
    "whole": P(),
}
ROWS = ("length", "frozen", "overrun")  # of `KVCache`
# Letters of `kvjax.model.llama.WEIGHTS`: heads, MLP channels and vocabulary are split, the width D never.
WEIGHT_AXES = {"K": "tensor", "F": "tensor", "V": "tensor"}


def parse_mesh(text: str) -> dict[str, int]:
    """ "seq=4,tensor=2" as a dict; axes that are not named are 1."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ValueError(f"`mesh={text}`: {part!r} must be data=N, seq=N or tensor=N; try seq=4,tensor=2.")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes `data`, `seq` and `tensor`.

    Args:
      sizes: such as "seq=4,tensor=2", or a dict.
      devices: the first of them are taken in order; None for all there are, in the order that suits their links.

    Raises:
      ValueError: for an unknown axis, and where there are too few devices.
    """
    parsed = parse_mesh(sizes if isinstance(sizes, str) else ",".join(f"{k}={v}" for k, v in sizes.items()))
    shape = tuple(parsed[axis] for axis in AXES)
    count = math.prod(shape)
    there = jax.devices() if devices is None else list(devices)
    if count > len(there):
        raise ValueError(
            f"`mesh={','.join(f'{a}={n}' for a, n in parsed.items() if n > 1)}` needs {count} devices, but there are "
            f"{len(there)}; make an axis smaller, or add devices."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    if devices is None and count == len(there):
        return jax.make_mesh(shape, AXES, axis_types=kinds)
    return Mesh(np.asarray(there[:count], dtype=object).reshape(shape), AXES, axis_types=kinds)


def stripes(mesh: Mesh | None) -> int:
    """P, the devices that blocks are dealt out to."""
    return 1 if mesh is None else mesh.shape["seq"]


def check(mesh: Mesh, *, batch: int, kv_heads: int) -> None:
    """Raises ValueError where a cache cannot be split evenly."""
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(f"`mesh` has the axes {', '.join(mesh.axis_names)}; make it with kvjax.sharding.make_mesh.")
    for axis, what, size in (("data", "batch", batch), ("tensor", "kv heads", kv_heads)):
        if size % mesh.shape[axis]:
            raise ValueError(f"`mesh`: {axis}={mesh.shape[axis]} must divide the {size} of {what}; choose a divisor.")


def spec(rule: str, leaf: Any) -> P:
    """The rule for an array: axes of size 1 are not split, nor is anything behind the array's last axis."""
    return P(*(axis if size > 1 else None for axis, size in zip(RULES[rule], leaf.shape)))


def specs(rule: str, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: spec(rule, leaf), tree)


def segment_specs(segment: "Segment", kv_heads: int) -> "Segment":
    """A segment of PartitionSpecs, for whichever arrays it has."""

    def params(tree: Any) -> Any:
        return jax.tree.map(lambda x: spec("heads" if x.ndim == 4 and x.shape[1] == kv_heads else "whole", x), tree)

    rules = {"k": "sealed", "v": "sealed", "reads": "counters"}
    rules |= dict.fromkeys(("k_recent", "v_recent", "k_sinks", "v_sinks", "dropped"), "recent")
    changes: dict[str, Any] = {name: specs(rule, getattr(segment, name)) for name, rule in rules.items()}
    return dataclasses.replace(segment, **changes, k_params=params(segment.k_params), v_params=params(segment.v_params))


def cache_specs(cache: "KVCache") -> "KVCache":
    """A cache of PartitionSpecs."""
    segments = tuple(segment_specs(segment, cache.shape.kv_heads) for segment in cache.segments)
    rest = specs("whole", dataclasses.replace(cache, segments=()))
    rows: dict[str, Any] = {name: spec("rows", getattr(cache, name)) for name in ROWS}
    return dataclasses.replace(rest, segments=segments, pending=specs("recent", cache.pending), **rows)


def _on(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(lambda s: NamedSharding(mesh, s), tree, is_leaf=lambda x: isinstance(x, P))


def cache_shardings(cache: "KVCache") -> "KVCache":
    """A cache of NamedShardings, one for each array of `cache`, which has a mesh."""
    assert cache.mesh is not None
    return _on(cache.mesh, cache_specs(cache))


def placed(cache: "KVCache") -> "KVCache":
    """An abstract cache with its shardings; as it is without a mesh."""
    if cache.mesh is None:
        return cache
    shardings = cache_shardings(cache)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, shardings)


def constrain(cache: "KVCache", sealed: bool = True) -> "KVCache":
    """The cache, told to stay where it lives; under `jit`, at the end of whatever returns one.

    Args:
      sealed: False leaves sealed blocks alone: those that only pass through `jit` would be copied.
    """
    if cache.mesh is None:
        return cache
    held = jax.lax.with_sharding_constraint(cache, cache_shardings(cache))
    if sealed:
        return held
    parts = zip(held.segments, cache.segments)
    return dataclasses.replace(held, segments=tuple(dataclasses.replace(a, k=b.k, v=b.v) for a, b in parts))


def replicated(x: Any, mesh: Mesh | None) -> Any:
    """Whole on every device, so that every process may read it."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def on_host(x: jax.Array) -> np.ndarray:
    """An array as numpy; where parts of it are on other processes, all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(_whole(x, x.sharding.mesh))  # type: ignore[attr-defined]


@functools.partial(jax.jit, static_argnums=1)
def _whole(x: jax.Array, mesh: Mesh) -> jax.Array:
    return replicated(x, mesh)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays, whole on this host, spread; of many processes each takes its own parts, and must have the same arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # `device_put` would send every array around to see that it is the same.
    def parts(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(parts, tree)


def device_bytes(tree: Any) -> int:
    """What one device holds of arrays that are spread evenly."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def weight_spec(name: str) -> P:
    from kvjax.model.llama import WEIGHTS  # the model is above the cache, but this is a table

    weight = WEIGHTS[name]
    return P(*(None,) * weight.stacked, *(WEIGHT_AXES.get(axis) for axis in weight.axes))


def model_shardings(config: Any, mesh: Mesh) -> dict[str, NamedSharding]:
    """Of every weight of a `kvjax.model.config.ModelConfig`.

    Raises:
      ValueError: where `tensor` does not divide what it splits.
    """
    from kvjax.model.llama import weight_shapes

    out = {}
    for name, shape in weight_shapes(config).items():
        axes = weight_spec(name)
        for size, axis in zip(shape, axes):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"`mesh`: {axis}={mesh.shape[axis]} must divide every axis it splits, but {name} {shape} has "
                    f"{size}; choose a divisor."
                )
        out[name] = NamedSharding(mesh, axes)
    return out


def shard_model(model: Any, mesh: Mesh) -> Any:
    """A loaded model (`kvjax.model.llama.LoadedModel`) with its weights spread over the mesh."""
    shardings = model_shardings(model.config, mesh)
    state = {name: place(x, shardings[name]) for name, x in model.state.items()}
    rope = place(model.rope, NamedSharding(mesh, P()))
    return dataclasses.replace(model, state=state, rope=rope)
