"""How many programs share the context of a row and head on Hopper: as many as fill the device in whole waves."""

import math

import jax.numpy as jnp

MULTIPROCESSORS = 132  # of an H100 and of an H200, as SXM boards
MULTIPROCESSOR_BYTES = 228 << 10  # of shared memory
BESIDE = 5 << 10  # shared memory that a program takes beside its arrays: Mosaic's (3 KiB and some) and CUDA's (1 KiB)
SPLIT_TOKENS = 2048  # what starts and ends a program (tables of levels, its answer) is little beside so many
WORTH = 0.02  # of the time that the device is busy may be lost for fewer programs


def programs_at_once(scratch: list, most: int = 2) -> int:
    """Programs with so much shared memory that the device holds at once; `most`: of a multiprocessor, for whose
    registers two of 128 threads are never too many."""
    return MULTIPROCESSORS * max(1, min(most, MULTIPROCESSOR_BYTES // each_bytes(scratch)))


def each_bytes(scratch: list) -> int:
    """Shared memory of a program, whose arrays begin at multiples of 1 KiB."""
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch)
    return BESIDE + sum(-(-size // 1024) * 1024 for size in sizes)


def splits_in_waves(heads: int, at_once: int, tokens: int) -> int:
    """The fewest splits of a context that keep the device as busy as any number does, or nearly so (`WORTH`).

    `heads * splits` programs run in waves of `at_once`, of which the last may be part empty. There are one or two of
    them, or one more than heads alone make.

    Args:
      heads: rows times kv heads.
      tokens: that a row has room for; a split takes `SPLIT_TOKENS` of them at least.
    """

    def waves(programs: int) -> int:
        return -(-programs // at_once)

    def busy(splits: int) -> float:
        programs = heads * splits
        return programs / (waves(programs) * at_once)

    most = min((waves(heads) + 1) * at_once // heads, tokens // SPLIT_TOKENS)
    candidates = range(1, max(1, most) + 1)
    best = max(map(busy, candidates))
    return next(s for s in candidates if busy(s) >= (1 - WORTH) * best)
