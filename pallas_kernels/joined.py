"""Heads side by side: p heads of H channels as one of p * H, so that channels fill whole registers of 128 lanes.

XLA on TPU puts another axis on lanes where channels would not fill them, and a kernel that wants them there has the
cache copied on every call. Two heads of 64, or four of 96, fill them, and no byte is added.

A joined head has the channels of its heads one after the other or, where keys are rotated on the fly, all first halves
and then all second ones: a rotation turns channels (i, i + H/2) of each head, and so those of the joined one.
"""

import math
from typing import Any

import numpy as np

LANES, SUBLANES = 128, 8


def heads_to_join(channels: int) -> int:
    """The fewest heads of so many channels that fill whole registers."""
    return LANES // math.gcd(channels, LANES)


def join(x: Any, heads: int, halves: bool = False) -> Any:
    """`x[..., K, n, H]` as `[..., K / heads, n, heads * H]`.

    Args:
      halves: first halves of all heads come before the second ones.
    """
    *lead, K, n, channels = x.shape
    d, parts = len(lead), 2 if halves else 1
    x = x.reshape(*lead, K // heads, heads, n, parts, channels // parts)
    return x.transpose(*range(d + 1), d + 2, d + 3, d + 1, d + 4).reshape(*lead, K // heads, n, heads * channels)


def separate(x: Any, heads: int, halves: bool = False) -> Any:
    """The inverse of `join`."""
    *lead, K, n, channels = x.shape
    d, parts = len(lead), 2 if halves else 1
    x = x.reshape(*lead, K, n, parts, heads, channels // heads // parts)
    return x.transpose(*range(d + 1), d + 3, d + 1, d + 2, d + 4).reshape(*lead, K * heads, n, channels // heads)


def join_rows(x: Any, heads: int) -> Any:
    """`x[..., K, n, T]` as `[..., K / heads, heads * n, T]`."""
    *lead, K, n, tokens = x.shape
    return x.reshape(*lead, K // heads, heads * n, tokens)


def join_groups(x: Any, heads: int) -> Any:
    """As `join_rows`, in as many rows as XLA leaves together: the others are further heads.

    (Of 12 rows of scales, 4 heads of 3 groups, XLA puts heads on sublanes. Three times as many heads of 4 rows have
    the same order in memory.)
    """
    *lead, K, n, tokens = x.shape
    rows = heads * n if heads * n % SUBLANES == 0 else math.gcd(heads * n, SUBLANES)
    return x.reshape(*lead, K * n // rows, rows, tokens)


def separate_rows(x: Any, heads: int) -> Any:
    """The inverse of both: to `[..., heads, n, T]`, all heads of a model."""
    *lead, K, n, tokens = x.shape
    return x.reshape(*lead, heads, K * n // heads, tokens)


def join_names(channel: Any, heads: int, channels: int, halves: bool = False) -> Any:
    """uint8 `[..., K, s, T]`, which name channels of heads, as `[..., K / heads, heads * s, T]` of joined heads.

    Args:
      channels: H.
      halves: as in `join`.
    """
    own = join_rows(channel, heads)
    rows = own.shape[-2]
    head = (np.arange(rows, dtype=np.uint8) // np.uint8(rows // heads)).reshape((1,) * (own.ndim - 2) + (rows, 1))
    if not halves:
        return own + head * np.uint8(channels)
    half = channels // 2
    return own + own // np.uint8(half) * np.uint8(half * (heads - 1)) + head * np.uint8(half)


def separate_names(channel: Any, heads: int, channels: int, halves: bool = False) -> Any:
    """The inverse of `join_names`."""
    own = separate_rows(channel, channel.shape[-3] * heads)
    if not halves:
        return own % np.uint8(channels)
    half = channels // 2
    return own % np.uint8(half) + own // np.uint8(half * heads) * np.uint8(half)
