"""What chips have, by their makers' data sheets and by what XLA lets a program use of them.

TPUs: cloud.google.com/tpu/docs, the pages of v5e, v5p, v6e and tpu7x. GPUs: NVIDIA's data sheets of the A100 80GB SXM,
H100 SXM and H200 SXM. Memory of a TPU is what libtpu 0.0.50 calls available when a program does not fit it
(CompileTimeHbmOom); of a GPU, what the CUDA driver reports as its total, of which XLA's allocator is given
98 % (XLA_PYTHON_CLIENT_MEM_FRACTION=.98; it takes 75 % unless told): the rest is the driver's context and NCCL's.
A TPU 7x chip is two devices to JAX; here, too, half a chip is a device.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

_GIB = 1 << 30
GPU_FRACTION = 0.98
# Of one all-reduce of a few kilobytes, on top of what its bytes take. A hop between TPU chips: the JAX team's "How to
# scale your model", chapter on sharded matrices (about 1 us). Through an NVSwitch: NCCL takes 6 us for two H100s with
# graphs and NVLS (github.com/NVIDIA/nccl/issues/1259) and more for eight. Estimates, reported apart from the limits.
_HOP_S = 1e-6
_SWITCH_S = 10e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      name: as it is asked for.
      target: what attention is compiled for (`kvjax.targets`).
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes/s.
      interconnect: bytes/s that a device sends to its neighbours over all its links together.
      flops: bf16 multiplications and additions per second.
      torus: dimensions of the network, 0 for a switch.
      tiled: whether XLA lays arrays out in tiles of 128 lanes (TPU).
    """

    name: str
    target: str
    memory: int
    bandwidth: float
    interconnect: float
    flops: float
    torus: int = 0
    tiled: bool = False

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of an array in memory, padding included."""
        return tiled_bytes(shape, itemsize) if self.tiled else math.prod(shape) * itemsize

    def latency(self, devices: int) -> float:
        """Seconds of one small all-reduce among so many devices, estimated: to the farthest one and back."""
        if devices == 1:
            return 0.0
        if not self.torus:
            return _SWITCH_S
        return 2 * _HOP_S * max(1, round(self.torus * devices ** (1 / self.torus) / 2))


def _tpu(name: str, gib: float, gb_s: float, ici_gb_s: float, tflops: float, torus: int) -> Chip:
    return Chip(name, f"tpu:{name}", int(gib * _GIB), gb_s * 1e9, ici_gb_s * 1e9, tflops * 1e12, torus, tiled=True)


def _gpu(name: str, arch: str, total: int, gb_s: float, nvlink_gb_s: float, tflops: float) -> Chip:
    return Chip(name, f"gpu:{arch}", int(total * GPU_FRACTION), gb_s * 1e9, nvlink_gb_s * 1e9, tflops * 1e12)


# Interconnect: one direction, half of what data sheets call bidirectional (v5e 400 GB/s, v5p 4,800 Gbit/s one way, v6e
# 800 GB/s, 7x 1,200 GB/s a chip; NVLink 600 and 900 GB/s).
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 819, 200, 197, torus=2),
        _tpu("v5p", 95.73, 2765, 600, 459, torus=3),
        _tpu("v6e", 31.24, 1638, 400, 918, torus=2),
        _tpu("7x", 94.74, 7380 / 2, 600 / 2, 2307 / 2, torus=3),
        _gpu("a100-80", "sm_80", 84_987_740_160, 2039, 300, 312),
        _gpu("h100", "sm_90", 84_929_347_584, 3352, 450, 989),
        _gpu("h200", "sm_90", 150_015_082_496, 4800, 450, 989),
    )
}


def parse_devices(text: str, own: Mapping[str, float | None] | None = None) -> tuple[Chip, int | None]:
    """A chip and how many, from "v5e:256"; None where the text does not say how many.

    Args:
      own: `memory`, `bandwidth`, `interconnect` and `flops` that replace the table's; of a chip that is not in it, all
        that are to be used. None leaves what is there.

    Raises:
      ValueError: for a chip that is not known and not described, and for a number below 1.
    """
    name, _, number = text.partition(":")
    replaced = {key: value for key, value in (own or {}).items() if value is not None}
    for key, value in replaced.items():
        if not value > 0 or math.isinf(value):
            raise ValueError(f"`{key}={value:g}` must be a positive number, in bytes or per second; try 8e10.")
    chip = CHIPS.get(name)
    if chip is None:
        missing = [key for key in ("memory", "bandwidth", "interconnect", "flops") if key not in replaced]
        if missing:
            raise ValueError(
                f"`devices={text}`: {name or 'no chip'!s} is none of {', '.join(CHIPS)}; for one of your own give its "
                f"{', '.join(missing)} too."
            )
        chip = Chip(name, "reference", 1, 1.0, 1.0, 1.0)
    if number and not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"`devices={text}`: {number!r} must be a number of devices, 1 or more, as in {chip.name}:8.")
    if "memory" in replaced:
        replaced["memory"] = int(replaced["memory"])
    return dataclasses.replace(chip, **replaced), int(number) if number else None  # type: ignore[arg-type]


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array in a TPU's memory: two of its axes, whichever pad least, fill tiles of 8 rows of 128 lanes.

    A row axis shorter than 8 takes a tile of the next power of two, at least one word of 32 bits. By experiment, so
    XLA's compiler lays out arrays that are passed in (libtpu 0.0.50; `tests/compile/test_plan.py`).
    """
    if not all(shape):
        return 0
    if len(shape) < 2:
        count = math.prod(shape)
        return max(512, itemsize * _up(count, min(1024, _power(count))))
    return max(512, itemsize * _padded(shape, itemsize, *_tile_axes(shape, itemsize)))


def tiled_order(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The axes of such an array from major to minor: those of its tiles are the last two, the others as they are."""
    if len(shape) < 2:
        return tuple(range(len(shape)))
    lane, row = _tile_axes(shape, itemsize)
    return *(axis for axis in range(len(shape)) if axis not in (lane, row)), row, lane


def _tile_axes(shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The axes of a tile's lanes and rows; of those that pad alike the later ones, as XLA chooses."""
    pairs = itertools.permutations(reversed(range(len(shape))), 2)
    return min(pairs, key=lambda pair: _padded(shape, itemsize, *pair))


def _padded(shape: tuple[int, ...], itemsize: int, lane: int, row: int) -> int:
    """Elements, padding included."""
    rest = math.prod(size for axis, size in enumerate(shape) if axis not in (lane, row))
    return rest * _up(shape[lane], 128) * _up(shape[row], _rows(shape[row], itemsize))


def _rows(size: int, itemsize: int) -> int:
    return min(8, max(4 // itemsize, _power(size)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
