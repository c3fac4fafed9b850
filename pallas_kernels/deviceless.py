"""Compiles for TPUs and GPUs that are not there, with their real compilers, and reads what came out.

    on = deviceless.target("v5p")  # or v5e, v6e, 7x, h100, h200
    compiled = deviceless.compile(step, abstract_arguments, on, donate=(2,))
    compiled.memory.temporary, compiled.kernels["my_kernel"].bundles

The TPU compiler is the wheel `libtpu`; the GPU's are `jax-cuda13-plugin`, `nvidia-nvjitlink` (the assembler that JAX
uses wherever it runs on a GPU; without it ptxas takes its place and shares out registers a little differently) and
`nvidia-cuda-nvdisasm`: `pip install 'kvjax[compile]'`, Python >= 3.12. No driver and no toolkit is needed. JAX itself
runs on the CPU; set JAX_PLATFORMS=cpu, or the GPU's plugin looks for a driver first, and gives up. A kernel that is
written per generation does not see the target: pass it `Target.kernel_chip`.

The compilers read their settings once, from the environment: the first `target` of a process sets LIBTPU_INIT_ARGS,
so nothing may have used libtpu in that process before.
"""

import atexit
import contextlib
import ctypes
import ctypes.util
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import listings

# Names as libtpu has them; of v5p and 7x no smaller piece than a host's four chips can be described.
TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
TPU_NAMES = {chip: topology.partition(":")[0] for chip, topology in TPU_TOPOLOGIES.items()}

# What XLA asks of a GPU: NVIDIA's data sheets of the SXM boards, and the limits of compute capability 9.0 in the
# CUDA programming guide.
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_320_000_000, 84_929_347_584),
    "h200": ("NVIDIA H200", 4_800_000_000_000, 150_754_820_096),
}
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 patch: 0 }}
dnn_version_info {{ major: 9 minor: 28 }}
device_description_str: "{name}"
"""
CHIPS = (*TPU_TOPOLOGIES, *GPUS)


@dataclasses.dataclass(frozen=True)
class Target:
    """One chip that is not there.

    Attributes:
      chip: as in `CHIPS`.
      platform: "tpu" or "cuda", as JAX's lowering takes it.
      kernel_chip: the generation, as `api.decode_attention(chip=)` takes it.
      sharding: all on that chip.
    """

    chip: str
    platform: str
    kernel_chip: str
    sharding: NamedSharding


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device, as the compiler lays arrays out (padding included)."""

    argument: int
    output: int
    alias: int
    temporary: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made.

    Attributes:
      executable: JAX's, which cannot run here.
      memory: bytes it needs.
      kernels: what became of each Pallas kernel, by name. A GPU kernel that this process has compiled before, for
        whatever program, is not compiled and listed again.
    """

    executable: jax.stages.Compiled
    memory: Memory
    kernels: dict[str, Any]

    @functools.cached_property
    def text(self) -> str:
        """The optimised HLO."""
        return self.executable.as_text() or ""


def missing(chip: str) -> str:
    """Why this process cannot compile for the chip, in one line; empty where it can."""
    if chip not in CHIPS:
        return f"`chip={chip}` is none of {', '.join(CHIPS)}."
    wanted = {"libtpu": "libtpu"}
    if chip in GPUS:
        wanted = {"jax_plugins.xla_cuda13": "jax-cuda13-plugin", "absl": "absl-py"}
        if jax.__version_info__ < (0, 11):
            return f"the GPU compiler needs JAX >= 0.11 (so Python >= 3.12), and this is JAX {jax.__version__}."
    for module, wheel in wanted.items():
        if not _installed(module):
            return f"compiling for {chip} needs {wheel}, which is not installed: pip install 'kvjax[compile]'."
    if chip in GPUS and not (_cuda_file("lib/libnvJitLink.so*") or ctypes.util.find_library("nvJitLink")):
        return f"compiling for {chip} needs nvJitLink, which is not installed: pip install 'kvjax[compile]'."
    if chip in GPUS and not (_cuda_file("bin/nvdisasm") or shutil.which("nvdisasm")):
        return f"compiling for {chip} needs nvdisasm, which is not installed: pip install 'kvjax[compile]'."
    return ""


def target(chip: str) -> Target:
    """A chip to compile for.

    Raises:
      NotImplementedError: where its compiler is not installed, in one line.
    """
    if reason := missing(chip):
        raise NotImplementedError(reason)
    return _target(chip)


@functools.cache
def _target(chip: str) -> Target:
    if chip in TPU_TOPOLOGIES:
        _dump_directory()
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGIES[chip])
        return Target(chip, "tpu", chip, _on(topology.devices[0]))
    return Target(chip, "cuda", "sm_90", _on(gpus(chip, "1x1x1")[0]))


def gpus(chip: str, topology: str) -> list[Any]:
    """GPUs that are not there; topology: processes x hosts of each x GPUs of each, as the plugin has it."""
    name, bandwidth, memory = GPUS[chip]
    text = GPU_TARGET.format(name=name, bandwidth=bandwidth, memory=memory)
    try:
        return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=text).devices
    except NotImplementedError as error:  # the plugin looked for a driver and its libraries, and gave up
        raise NotImplementedError(f"compiling for {chip} without one needs JAX_PLATFORMS=cpu ({error}).") from error


def compile(fn: Callable[..., Any], args: tuple[Any, ...], on: Target, donate: tuple[int, ...] = ()) -> Compiled:
    """Compiles `fn(*args)` for a chip.

    Args:
      fn: to be jitted, or jitted already (then `donate` is its own).
      args: pytrees of arrays or ShapeDtypeStructs; only shapes and dtypes are looked at.
      donate: numbers of arguments to be donated.
    """

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=on.sharding)

    jitted = fn if hasattr(fn, "trace") else jax.jit(fn, donate_argnums=donate)
    lower = jitted.trace(*jax.tree.map(place, args)).lower
    kernels: dict[str, Any]
    if on.platform == "tpu":
        with _schedules() as directory:
            executable = lower(lowering_platforms=("tpu",)).compile()
            kernels = _tpu_kernels(directory, executable)
    else:
        with _printed() as printed:
            executable = lower(lowering_platforms=("cuda",)).compile()
        kernels = _gpu_kernels(printed())
    m = executable.memory_analysis()
    memory = Memory(m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes)
    return Compiled(executable, memory, kernels)


def _cuda_file(pattern: str) -> bool:
    """Whether NVIDIA's wheels hold such a file of the CUDA toolkit."""
    spec = importlib.util.find_spec("nvidia") if _installed("nvidia") else None
    folders = spec.submodule_search_locations or () if spec else ()
    return any(any(Path(folder).glob(f"*/{pattern}")) for folder in folders)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would be in
        return False


def _on(device: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())


@functools.cache
def _dump_directory() -> Path:
    """Where libtpu writes schedules: one folder per process, since it reads its flags once."""
    directory = tempfile.mkdtemp(prefix="kvjax-libtpu-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    flags = (
        f"--xla_jf_dump_to={directory}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final_(hlo|bundles)",  # all 70 passes take as long as compiling
        os.environ.get("LIBTPU_INIT_ARGS", ""),
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    be_no_tpu_host()
    return Path(directory)


def be_no_tpu_host() -> None:
    """Keeps libtpu from asking a cloud's metadata server what this machine is, and from locking out another process."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _schedules() -> Iterator[Path]:
    """The folder that libtpu writes to, empty."""
    directory = _dump_directory()
    for file in directory.iterdir():
        file.unlink()
    yield directory


@contextlib.contextmanager
def _printed() -> Iterator[Callable[[], str]]:
    """What Mosaic GPU prints about the kernels it compiles, when the block has ended.

    It prints to the process's stdout. MOSAIC_GPU_DUMP_TO would write files, but every pass of MLIR too: minutes.
    """
    wanted = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTXAS", "SASS", "RESOURCES")}
    before = {name: os.environ.get(name) for name in wanted}
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        os.environ.update(wanted)
        try:
            # `sys.stdout` may be another file than the process's: pytest's, a notebook's.
            with open(os.dup(1), "w") as python, contextlib.redirect_stdout(python):
                yield lambda: text[0]
        finally:
            ctypes.CDLL(None).fflush(None)
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def _tpu_kernels(directory: Path, executable: jax.stages.Compiled) -> dict[str, listings.Schedule]:
    names = re.findall(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', executable.as_text() or "")
    kernels = {}
    for name in names:
        slots = sorted(directory.glob(f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt"))
        code = [f for f in sorted(directory.glob(f"*-{name}-*-final_bundles.txt")) if "analysis" not in f.name]
        if not slots or not code:
            raise RuntimeError(
                f"libtpu wrote no schedule of {name}: it was loaded before `deviceless.target` was called."
            )
        kernels[name] = listings.schedule(slots[-1].read_text(), code[-1].read_text())
    return kernels


def _gpu_kernels(printed: str) -> dict[str, listings.GpuKernel]:
    kernels = listings.gpu_kernels(printed)
    for name, kernel in kernels.items():
        if not kernel.opcodes:
            raise RuntimeError(f"Mosaic printed no machine code of {name}: it needs nvdisasm beside ptxas.")
    return kernels
