"""What a benchmark must know of the device it runs on."""

import os
from pathlib import Path

import jax

from kvjax.targets import default_target, split
from pallas_kernels.decode_attention import api

_IMPLEMENTATIONS: dict[str, api.Implementation] = {"cpu": "xla_cpu", "gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
# More than the last cache of any GPU (H200: 60 MB, B200: 126 MB) and the VMEM of any TPU (128 MiB).
_ACCELERATOR_CACHE_BYTES = 128 << 20
_CPU_CACHE_BYTES = 32 << 20


def implementation() -> api.Implementation:
    """The kernels that are written for the default backend."""
    backend = jax.default_backend()
    return "numba_cpu" if backend == "cpu" and api.installed("numba_cpu") else _IMPLEMENTATIONS[backend]


def chip() -> str:
    """The generation of the default device as `api.decode_attention` takes it; "" where it has none."""
    return split(default_target())[1]


def memory_bytes() -> int:
    """Memory that arrays may take: the allocator's limit, or half of the machine's."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def rotation_bytes() -> int:
    """Bytes that calls must go through before they come back to the first: four times the last cache."""
    if jax.default_backend() != "cpu":
        return 4 * _ACCELERATOR_CACHE_BYTES
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # "36608K"
    text = size.read_text().strip() if size.is_file() else ""
    return 4 * (int(text[:-1]) << 10 if text.endswith("K") else _CPU_CACHE_BYTES)


def call_bytes() -> int:
    """Bytes that a timed call should read: 1 ms or more, beside which the 20 us of a call from Python are little."""
    return 0 if jax.default_backend() == "cpu" else 4 << 30


def ceiling_bytes() -> int:
    """Size of the array whose copy and sum are the ceilings."""
    return 256 << 20 if jax.default_backend() == "cpu" else min(2 << 30, memory_bytes() // 8)


def versions() -> dict[str, str]:
    """Packages of the backend, beside those that every report names."""
    import importlib.metadata

    found = {}
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "torch", "flash-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
