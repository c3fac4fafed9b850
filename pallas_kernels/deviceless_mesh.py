"""Compiles programs for many chips that are not there, with their real compilers, and counts what they need.

    devices = deviceless_mesh.devices("v5p", 8)
    made = deviceless_mesh.compile(step, arguments_with_shardings_over_those_devices)
    made.memory.temporary, made.collectives["all-reduce"]

`pallas_kernels.deviceless` reads the kernels' schedules too: it has libtpu write them out, at twice the time. A process
that uses both calls `deviceless.target` first.
"""

import dataclasses
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import deviceless
from pallas_kernels.deviceless import Memory

# Slices as they are sold: chips along x, y and z by their number. A pod of v5e or v6e has 256.
_FLAT = {n: (a, n // a) for n, a in {1: 1, 4: 2, 8: 2, 16: 4, 32: 4, 64: 8, 128: 8, 256: 16}.items()}
_CUBES = {
    1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
}  # fmt: skip
_GPUS_PER_HOST = 8
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What a compiler says of a program that does not fit.

    Attributes:
      needed, available: bytes, to a hundredth of a GiB; None where the compiler does not say.
      compile_s, compile_cpu_s: seconds until it said so, and those of this process on the CPU, whatever else it does.
    """

    needed: int | None
    available: int | None
    compile_s: float
    compile_cpu_s: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made for one device of many.

    Attributes:
      memory: bytes on each device, padding included.
      collectives: how many of each of `COLLECTIVES` the program's text holds; those in a loop over layers count once.
      lower_s, compile_s: seconds to trace and lower, and to compile.
      compile_cpu_s: as in `OutOfMemory`.
      text: the optimised HLO.
    """

    memory: Memory
    collectives: dict[str, int]
    lower_s: float
    compile_s: float
    compile_cpu_s: float
    text: str


def devices(chip: str, count: int) -> list[Any]:
    """So many devices that are not there, linked as in a slice of that size, or in hosts of eight GPUs.

    Raises:
      NotImplementedError: where the compiler is not installed.
      ValueError: for a number of which there is no slice.
    """
    if reason := deviceless.missing(chip):
        raise NotImplementedError(reason)
    if chip in deviceless.GPUS:
        hosts, rest = divmod(count, _GPUS_PER_HOST)
        if hosts > 1 and rest:
            raise ValueError(f"`count={count}` of {chip} must be at most {_GPUS_PER_HOST} or a multiple of it.")
        return deviceless.gpus(chip, f"1x{hosts}x{_GPUS_PER_HOST}" if hosts > 1 else f"1x1x{count}")
    deviceless.be_no_tpu_host()
    slices = _FLAT if chip in ("v5e", "v6e") else _CUBES
    chips = count // 2 if chip == "7x" else count  # its chips are two devices each
    if chips not in slices or (chip == "7x" and (count % 2 or chips < 4)):
        raise ValueError(f"`count={count}`: there is no slice of {chip} of that size; the sizes are {_sizes(chip)}.")
    shape = "x".join(map(str, slices[chips]))
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{deviceless.TPU_NAMES[chip]}:{shape}").devices


def _sizes(chip: str) -> str:
    if chip == "7x":
        return ", ".join(str(2 * n) for n in _CUBES if n > 1)
    return ", ".join(map(str, _FLAT if chip in ("v5e", "v6e") else _CUBES))


def compile(jitted: Any, args: tuple[Any, ...]) -> Compiled | OutOfMemory:
    """Compiles `jitted(*args)`, of which every leaf has a sharding over devices of one kind.

    Only the TPU's compiler says that a program does not fit; of a GPU's compare `memory` with what there is.
    """
    platform = next(iter(jax.tree.leaves(args)[0].sharding.device_set)).platform
    start = time.perf_counter()
    lowered = jitted.trace(*args).lower(lowering_platforms=("tpu" if platform == "tpu" else "cuda",))
    middle, cpu = time.perf_counter(), time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _out_of_memory(str(error), time.perf_counter() - middle, time.process_time() - cpu)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    m, text = executable.memory_analysis(), executable.as_text() or ""
    memory = Memory(m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes)
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return Compiled(memory, found, middle - start, end - middle, cpu, text)


def _out_of_memory(message: str, *seconds: float) -> OutOfMemory:
    figures = re.search(r"\(([\d.]+)([KMG])\) exceeds available \w+ \(([\d.]+)([KMG])\)", message)
    if not figures:
        return OutOfMemory(None, None, *seconds)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    needed, available = (int(float(figures[i]) * units[figures[i + 1]]) for i in (1, 3))
    return OutOfMemory(needed, available, *seconds)
