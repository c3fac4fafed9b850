"""What decode attention over a storage costs on a chip that is not there: instructions against memory cycles.

A kernel keeps up with memory where its instructions for some bytes take no longer than the bytes. Both are counted for
a *tile*, the keys and values of 128 tokens of one kv head: the instructions from the real compiler's listing, the
cycles from the chip's bandwidth. These are budgets; a device's clock, its waits and its cache are not in them.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import deviceless, joined, listings
from pallas_kernels.decode_attention import api, heads, mosaic_gpu, specs
from pallas_kernels.decode_attention.formats import Format, Planes

# Bytes that HBM delivers per clock of a TensorCore (two of them share a v5p or 7x) or of one of 132 SMs: bandwidth over
# clock, from the vendors' data sheets.
BYTES_PER_CLOCK = {"v5e": 546.0, "v5p": 700.0, "v6e": 937.0, "7x": 1700.0, "h100": 14.5, "h200": 20.7}
TILE = 128
VECTOR = ("VALU", "XLU", "EUP", "VLOAD", "VSTORE")  # a TPU's units for vector registers
VREG = 1024  # 32-bit elements of a TPU's vector register
LANES = 128  # instructions that an SM's four schedulers issue per clock, times 32 lanes
LONG = 1 << 20
LLAMA_3_8B = specs.Shape(layers=2, batch=1, blocks=0, heads=8, group=4, channels=128)
LLAMA_3_2_1B = dataclasses.replace(LLAMA_3_8B, channels=64)
PHI_3_MINI = dataclasses.replace(LLAMA_3_8B, heads=32, group=1, channels=96)
# What is counted, by name: a storage of `specs.STORAGES`, or what is read of planes, and a model's shape.
CASES = {storage: (storage, LLAMA_3_8B) for storage in specs.STORAGES}
CASES |= {"kivi4-h64": ("kivi4", LLAMA_3_2_1B), "kvquant3-h64": ("kvquant3", LLAMA_3_2_1B)}
CASES |= {"int4-h96": ("int4", PHI_3_MINI)}
CASES |= {name: (name, LLAMA_3_8B) for name in specs.PLANES_READ}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Static cost of one storage on one chip.

    Attributes:
      tile_bytes: codes, metadata and slots of a tile, as stored.
      memory_cycles: that take so long to fetch, at least.
      instructions: cycles they take per tile, at least. TPU: bundles that a tile more in a grid step adds. GPU: those
        of the loop over the context, one per cycle and scheduler.
      whole: as `instructions`, of a whole grid step at 1,048,576 tokens and with all that starts and ends a row.
      units: TPU: slots by unit. GPU: instructions by opcode. Per tile, as `instructions`.
      per_element: instructions of one lane per element of K and V.
      spills: TPU: spills and fills. GPU: bytes.
      temporary_bytes: of the call, at 1,048,576 tokens.
      padding: bytes the storage takes on the device, over its own.
      registers, shared_bytes: GPU; per thread and per block.
    """

    storage: str
    chip: str
    tile_bytes: float
    memory_cycles: float
    instructions: float
    whole: float
    units: dict[str, float]
    per_element: float
    spills: int
    temporary_bytes: int
    padding: float
    registers: int = 0
    shared_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Instructions over memory cycles: at most 1 where memory is the limit."""
        return self.instructions / self.memory_cycles

    @property
    def cycles(self) -> float:
        """Predicted for a tile: whichever is slower."""
        return max(self.whole, self.memory_cycles)


def implementation(chip: str) -> api.Implementation:
    return "mosaic_tpu" if chip in deviceless.TPU_TOPOLOGIES else "mosaic_gpu"


def problem(storage: str, tokens: int, shape: specs.Shape, on: deviceless.Target) -> tuple[Format, Format, specs.Shape]:
    """Abstract keys and values of a named storage over so many tokens, in blocks that suit a TPU."""
    kinds = specs.STORAGES[storage]
    shape = specs.in_tpu_blocks(kinds, shape)
    shape = dataclasses.replace(shape, blocks=tokens // shape.tokens)
    k, v = specs.abstract(kinds.keys, shape), specs.abstract(kinds.values, shape)
    if on.platform == "tpu" and (count := joined.heads_to_join(shape.channels)) > 1:
        k, v = jax.eval_shape(lambda k, v: heads.join_formats(k, v, count, kinds.pre_rope), k, v)
    return k, v, shape


def compile_storage(storage: str, tokens: int, on: deviceless.Target, shape: specs.Shape) -> deviceless.Compiled:
    """The kernel for a named storage over so many tokens.

    Raises:
      NotImplementedError: where there is no kernel for it.
    """
    k, v, shape = problem(storage, tokens, shape, on)
    pre_rope = specs.STORAGES[storage].pre_rope

    def attend(q, k, v, layer, first, last, position):
        return api.decode_attention(
            q, k, v, layer=layer, first=first, last=last, implementation=implementation(on.chip), chip=on.kernel_chip,
            rotation=specs.rotation(shape, position) if pre_rope else None,
        )  # fmt: skip

    row = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    q = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.group, shape.channels), jnp.float32)
    return deviceless.compile(attend, (q, k, v, jax.ShapeDtypeStruct((), jnp.int32), row, row, row), on)


def cost(
    storage: str, on: deviceless.Target, shape: specs.Shape = LLAMA_3_8B, marginal: bool = True, name: str = ""
) -> Cost:
    """Compiles a storage's kernel, and counts.

    Args:
      name: of the case; the storage's without it.
      marginal: TPU: compile a second time, to tell apart what a tile costs and what a step does. Else all is shared out
        over the tiles of a step.

    Raises:
      NotImplementedError: where there is no kernel for it.
    """
    if storage in specs.PLANES_READ:
        return _planes_cost(storage, on, shape)
    k, v, shape = problem(storage, LONG, shape, on)
    kernel, memory = _sm_90(storage, shape) if on.platform == "cuda" else _compile_long(storage, on, shape)
    elements = 2 * TILE * shape.channels
    if on.platform == "tpu":
        whole, units = _tpu_tile(storage, on, shape, kernel, marginal)
        instructions = units.pop("bundles")
        vector = sum(units.get(unit, 0.0) for unit in VECTOR)
        per_element, spills = vector * VREG / elements, kernel.spills
        facts = {}
    else:
        units = _gpu_tile(kernel, k, v, shape.group, elements)
        instructions = whole = sum(units.values())
        per_element, spills = instructions * LANES / elements, kernel.spill_bytes
        facts = {"registers": kernel.registers, "shared_bytes": kernel.shared_bytes}
    tile_bytes = nbytes((k, v)) / (shape.layers * shape.batch * shape.heads * LONG / TILE)
    return Cost(
        name or storage,
        on.chip,
        tile_bytes,
        tile_bytes / BYTES_PER_CLOCK[on.chip],
        instructions,
        whole,
        units,
        per_element,
        spills,
        memory.temporary,
        memory.argument / nbytes((k, v)),
        **facts,
    )


def _compile_long(storage: str, on: deviceless.Target, shape: specs.Shape) -> tuple[Any, deviceless.Memory]:
    compiled = compile_storage(storage, LONG, on, shape)
    if len(compiled.kernels) != 1:
        raise ValueError(f"one kernel was to be compiled, and there are {sorted(compiled.kernels) or 'none'}")
    (kernel,) = compiled.kernels.values()
    return kernel, compiled.memory


@functools.cache
def _sm_90(storage: str, shape: specs.Shape) -> tuple[Any, deviceless.Memory]:
    # H100 and H200 run the same code, and Mosaic lists what a process compiles a second time no more.
    return _compile_long(storage, deviceless.target("h100"), shape)


def nbytes(tree: Any) -> int:
    """Of arrays, abstract or not."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _tpu_tile(
    storage: str, on: deviceless.Target, shape: specs.Shape, kernel: listings.Schedule, marginal: bool
) -> tuple[float, dict[str, float]]:
    """Bundles per tile of a whole step, and slots and "bundles" per tile: of it, or the difference of two."""
    tpu_plan = importlib.import_module("pallas_kernels.decode_attention.tpu_plan")  # as `api` imports kernels

    count = joined.heads_to_join(shape.channels)

    def tiles(tokens: int) -> int:
        k, v, _ = problem(storage, tokens, shape, on)
        plan = tpu_plan.make_plan(k, v, count * heads.padded_group(shape.group, count), on.kernel_chip)
        return count * plan.chunk_blocks * plan.tokens // TILE

    many = tiles(LONG)
    whole = kernel.step["bundles"] / many
    if not marginal:
        return whole, {unit: slots / many for unit, slots in kernel.step.items()}
    tokens = 2 * many // count * TILE  # of a context shorter than four steps, a step is a quarter
    few = tiles(tokens)
    if few >= many:
        raise ValueError(f"a step over {tokens} tokens is no smaller than one over {LONG}")
    (smaller,) = compile_storage(storage, tokens, on, shape).kernels.values()
    return whole, {unit: (kernel.step[unit] - smaller.step[unit]) / (many - few) for unit in kernel.step}


def _planes_cost(storage: str, on: deviceless.Target, shape: specs.Shape) -> Cost:
    """Of a run read to the levels of `specs.PLANES_READ`; all rows of a chip are paths through one kernel."""
    # H100 and H200 run the same code, as above.
    kernel, memory, padding = _planes(deviceless.target("h100") if on.platform == "cuda" else on, shape)
    levels, elements = specs.PLANES_READ[storage], 2 * TILE * shape.channels
    if on.platform == "tpu":
        units = _tpu_planes(kernel, levels, shape)
        instructions = units.pop("bundles")
        per_element, spills = sum(units.get(unit, 0.0) for unit in VECTOR) * VREG / elements, kernel.spills
        facts = {}
    else:
        units = _gpu_planes(kernel, levels)
        instructions = sum(units.values())
        per_element, spills = instructions * LANES / elements, kernel.spill_bytes
        facts = {"registers": kernel.registers, "shared_bytes": kernel.shared_bytes}
    widths = (0, 8, 12, 16)
    tile_bytes = sum(widths[level] for level in levels) * TILE * shape.channels / 8
    return Cost(
        storage,
        on.chip,
        tile_bytes,
        tile_bytes / BYTES_PER_CLOCK[on.chip],
        instructions,
        instructions,
        units,
        per_element,
        spills,
        memory.temporary,
        padding,
        **facts,
    )


def _tpu_planes(kernel: listings.Schedule, levels: tuple[int, int], shape: specs.Shape) -> dict[str, float]:
    """Slots and "bundles" per tile, of keys and values read to `levels`."""
    tpu_planes = importlib.import_module("pallas_kernels.decode_attention.tpu_planes")
    blocks, _, per_chunk = tpu_planes.units(shape.tokens, LONG // shape.tokens, shape.channels)
    chunk, *sides = kernel.loops[-3:]
    slots = kernel.count(chunk, tuple(sides))
    for loop, level in zip(sides, levels):
        paths = [b for b in kernel.branches if loop.start <= b.start and b.stop <= loop.stop and b.stop - b.start > 32]
        if len(paths) != 4:
            raise ValueError(f"the loop at bundle {loop.start:#x} was to have a branch for each of 4 levels")
        for unit, used in kernel.count(loop, tuple(b for i, b in enumerate(paths) if i != level)).items():
            slots[unit] += per_chunk * used
    tiles = per_chunk * blocks * shape.tokens / TILE
    return {unit: used / tiles for unit, used in slots.items()}


def _gpu_planes(kernel: listings.GpuKernel, levels: tuple[int, int]) -> dict[str, float]:
    """Instructions per tile, which is a block, and opcode, of keys and values read to `levels`."""
    hot = _hot_loop(kernel)
    ends = {hot.start, hot.stop, *(i for b in kernel.branches for i in (b.start, b.stop) if hot.start < i < hot.stop)}
    pieces = [listings.Loop(*ends, 1) for ends in itertools.pairwise(sorted(ends))]
    paths = [piece for piece in pieces if kernel.count(piece)["HGMMA"]]
    if len(paths) != 6:
        raise ValueError(f"the loop was to have products at each of 3 levels of keys and of values, not {len(paths)}")
    left_out = []
    for side, level in zip((paths[:3], paths[3:]), levels):
        by_planes = sorted(side, key=lambda piece: sum(kernel.count(piece).values()))
        left_out += [piece for i, piece in enumerate(by_planes, 1) if i != level]
    return dict(kernel.count(hot, tuple(left_out)))


@functools.cache
def _planes(on: deviceless.Target, shape: specs.Shape) -> tuple[Any, deviceless.Memory, float]:
    """The kernel that reads in part, over 1,048,576 tokens, its memory, and bytes on the device over those stored."""
    shape = dataclasses.replace(shape, blocks=LONG // shape.tokens)
    kinds = specs.PLANES["alignedkv"]
    k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
    assert isinstance(k, Planes) and isinstance(v, Planes)
    name = implementation(on.chip)
    api.check(k, v, shape.group, name, on.kernel_chip, False)
    run = api.run(k, name)
    head = (shape.batch, shape.heads, shape.group)
    rule = (shape.batch, -(-shape.blocks // run), shape.heads)
    k = dataclasses.replace(k, levels=jax.ShapeDtypeStruct(rule, jnp.int32), run=run)
    limits, known = (jax.ShapeDtypeStruct(size, jnp.float32) for size in ((3, *rule), head))
    v = dataclasses.replace(v, levels=None, limits=limits, known=known, run=run)

    def attend(q, k, v, layer, first, last):
        return api.attend_in_part(
            q, k, v, layer=layer, first=first, last=last, implementation=name, chip=on.kernel_chip
        )

    row = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    q = jax.ShapeDtypeStruct((*head, shape.channels), jnp.float32)
    compiled = deviceless.compile(attend, (q, k, v, jax.ShapeDtypeStruct((), jnp.int32), row, row), on)
    (kernel,) = compiled.kernels.values()
    return kernel, compiled.memory, compiled.memory.argument / nbytes((k, v))


def _gpu_tile(kernel: listings.GpuKernel, k: Format, v: Format, group: int, elements: int) -> dict[str, float]:
    """Instructions per tile and opcode of the loop over the context."""
    hot = _hot_loop(kernel)
    tiles = mosaic_gpu.chunk_tokens(k, v, group) / TILE
    if _products(kernel, hot) * 64 * 16 < tiles * elements:
        raise ValueError(f"{_products(kernel, hot)} matrix products of 64 x 16 are too few for {tiles:g} tiles")
    # Every lane of a warp group's four warps runs them, one warp on each of an SM's four schedulers.
    return {opcode: n / tiles for opcode, n in kernel.count(hot).items()}


def _hot_loop(kernel: listings.GpuKernel) -> listings.Loop:
    # Slow paths (waits) stand behind the end and jump back, which looks like a larger loop.
    products = {loop: _products(kernel, loop) for loop in kernel.loops}
    return min((loop for loop in products if products[loop] == max(products.values())), key=lambda x: x.stop - x.start)


def _products(kernel: listings.GpuKernel, loop: listings.Loop) -> int:
    return sum(kernel.count(loop)[op] for op in ("HGMMA", "HMMA"))
