"""Memory of this process as it runs, and of compiled functions as XLA predicts it."""

import dataclasses
import gc
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import jax

_STATM = Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class CompiledBytes:
    """What one device needs for a compiled function.

    Attributes:
      argument: of what it is given.
      temporary: of what it makes on the way.
      output: of results that are no donated argument.
    """

    argument: int
    temporary: int
    output: int


def compiled_bytes(function: Any, *args: Any) -> CompiledBytes:
    """Compiles `jax.jit`'s `function` for arguments, which may be ShapeDtypeStructs.

    A later call with such arguments does not compile again.
    """
    memory = function.lower(*args).compile().memory_analysis()
    if memory is None:
        raise NotImplementedError(f"XLA says nothing about memory on {jax.default_backend()}.")
    return CompiledBytes(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


def resident_bytes() -> int:
    """Physical memory of the process now; where /proc does not tell, its peak (`peak_bytes`)."""
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def peak_bytes() -> int:
    """The most physical memory that the process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB everywhere else


class Watch:
    """Samples physical memory while its `with` block runs.

    Attributes:
      before: bytes at its start.
      peak: the most that was seen; of what lasts less than `seconds` some is missed.
    """

    def __init__(self, seconds: float = 0.02):
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> "Watch":
        gc.collect()
        self.before = self.peak = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._done.wait(self._seconds):
            self.peak = max(self.peak, resident_bytes())
