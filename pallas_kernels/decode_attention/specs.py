"""Named shapes and storages, one list for tests, compile checks and benchmarks; random contents, never zeros."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import packing
from pallas_kernels.decode_attention.formats import Affine, Codebook, Dense, Format, Planes, Rotation


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a case: layers, batch, blocks of `tokens`, kv heads, query heads per kv head, head size."""

    layers: int
    batch: int
    blocks: int
    heads: int
    group: int
    channels: int
    tokens: int = 128


@dataclasses.dataclass(frozen=True)
class Storage:
    """A pair of formats by name: `keys` and `values` as `make` takes them, and whether keys are stored before RoPE."""

    keys: str
    values: str
    pre_rope: bool = False


# What each preset stores, by format: kind, bits and group ("-s": with outlier slots, as many as 1 % of the channels).
STORAGES = {
    "bf16": Storage("dense", "dense"),
    "f16": Storage("dense-f16", "dense-f16"),
    "kivi8": Storage("affine8-tokens32", "affine8-channels32"),
    "kivi4": Storage("affine4-tokens32", "affine4-channels32"),
    "kivi4-g128": Storage("affine4-tokens128", "affine4-channels128"),
    "kivi2": Storage("affine2-tokens32", "affine2-channels32"),
    "kivi2-g64": Storage("affine2-tokens64", "affine2-channels64"),
    "kivi1": Storage("affine1-tokens32", "affine1-channels32"),
    "asymkv-k2v1": Storage("affine2-tokens32", "affine1-channels32"),
    "int8": Storage("affine8-width", "affine8-width"),
    "int4": Storage("affine4-width", "affine4-width"),
    "kvquant4": Storage("codebook4-s", "codebook4-token-s", pre_rope=True),
    "kvquant3": Storage("codebook3-s", "codebook3-token-s", pre_rope=True),
    "kvquant2": Storage("codebook2-s", "codebook2-token-s", pre_rope=True),
    "kvquant4-dense": Storage("codebook4", "codebook4-token", pre_rope=True),
    "kvquant3-dense": Storage("codebook3", "codebook3-token", pre_rope=True),
    "kvquant2-dense": Storage("codebook2", "codebook2-token", pre_rope=True),
}

# Bit planes that are read in part: kernels are told how much of each run of blocks.
PLANES = {"alignedkv": Storage("planes-channels", "planes")}

# What is counted of it: planes of keys and of values that every run is read to, by their bits.
PLANES_READ = {"alignedkv-16": (3, 3), "alignedkv-12": (2, 2), "alignedkv-8": (1, 1), "alignedkv-8-0": (1, 0)}
# What benchmarks may time: planes too, every block read to one level ("-r1"), of which values are not all left out.
TIMED = STORAGES | {
    name: Storage(f"planes-channels-r{keys}", f"planes-r{values}")
    for name, (keys, values) in PLANES_READ.items()
    if values
}

# Two rows: `lengths` in tokens of the storage, as the name says ("full": all of it). T = 128.
LENGTHS = {"0,1": (0, 1), "T-1,T": (127, 128), "T+1,full": (129, None), "full,0": (None, 0)}

SHAPES = {
    "gqa4-h128": Shape(2, 2, 5, 2, 4, 128),
    "gqa4-h128-t256": Shape(2, 2, 3, 2, 4, 128, 256),
    "mha-h128": Shape(1, 2, 3, 3, 1, 128),
    "mqa16-h64": Shape(2, 2, 3, 1, 16, 64),
    "mqa16-h128": Shape(2, 2, 3, 1, 16, 128),
    "gqa4-h64": Shape(2, 2, 3, 4, 4, 64),
    "gqa16-h64": Shape(1, 2, 3, 2, 16, 64),
    "mha-h96": Shape(1, 2, 3, 4, 1, 96),
    "gqa3-h96": Shape(1, 2, 3, 2, 3, 96),
    "gqa3-h128": Shape(1, 2, 3, 2, 3, 128),
    "gqa2-h256": Shape(1, 2, 3, 1, 2, 256),
    "mqa2-h256-n96": Shape(1, 2, 96, 1, 2, 256),  # one head and whole tiles of blocks, as a device of many has them
}


def make(kind: str, shape: Shape, rng: np.random.Generator) -> Format:
    """Random storage of a kind named as in `STORAGES`; numpy arrays, made so that values are of order 1."""
    name, *rest = kind.split("-")
    lead = (shape.layers, shape.batch, shape.blocks)
    T, H, K = shape.tokens, shape.channels, shape.heads
    if name == "dense":
        values = rng.standard_normal((*lead, K, T, H), np.float32)
        if rest:
            return Dense(values.astype(np.float16).view(np.uint16), "float16")
        return Dense(values.astype(jnp.bfloat16).view(np.uint16), "bfloat16")
    if name == "planes":
        return _planes(kind, shape, rng)
    bits = int(name[-1])
    meta: tuple[int, ...]
    words = rng.integers(0, 2**32, (*lead, K, packing.packed_words(T, bits), H), dtype=np.uint32)
    if name.startswith("affine"):
        along: Literal["tokens", "channels"] = "tokens" if rest[0].startswith("tokens") else "channels"
        if rest[0] == "width":
            meta = (*lead, 1, 1, T)
        elif along == "tokens":
            meta = (*lead, K, T // int(rest[0].removeprefix(along)), H)
        else:
            meta = (*lead, K, H // min(int(rest[0].removeprefix(along)), H), T)
        scale = rng.uniform(0.5, 1.5, meta) * 3.5 / (2**bits - 1)
        return Affine(words, _half(scale), _half(rng.uniform(-2.5, -1.0, meta)), bits, along)
    levels = np.sort(rng.uniform(-1.1, 1.1, (shape.layers, 2**bits)), axis=-1).astype(np.float32)
    if "token" in rest:
        scale, zero = _half(rng.uniform(1, 3, (*lead, 1, T))), _half(rng.uniform(-0.3, 0.3, (*lead, 1, T)))
    else:
        size = (shape.layers, K, 1, H)
        scale, zero = (rng.uniform(a, b, size).astype(np.float32) for a, b in ((1, 3), (-0.5, 0.5)))
    channel = residual = None
    if "s" in rest:
        slots = (*lead, K, -(-H // 100), T)
        channel = rng.integers(0, H, slots, dtype=np.uint8)
        residual = _half(rng.normal(0, 4, slots) * (rng.random(slots) < 0.7))
    return Codebook(words, levels, scale, zero, channel, residual, bits, "token" if "token" in rest else "channel")


def _planes(kind: str, shape: Shape, rng: np.random.Generator) -> Planes:
    """Random float16 in planes, of which subnormal numbers are one in fifty; levels from 1 to 3 by blocks, or "-rN"."""
    order: Literal["words", "channels"] = "channels" if kind.startswith("planes-channels") else "words"
    lead, T, H = (shape.layers, shape.batch, shape.blocks, shape.heads), shape.tokens, shape.channels
    x = rng.standard_normal((*lead, T, H))
    bits = _half(np.where(rng.random(x.shape) < 0.02, x * 2.0**-15, x))
    planes = []
    for width, shift in ((8, 8), (4, 4), (4, 0)):
        plane = np.asarray(packing.pack((bits >> shift) & (2**width - 1), width))
        planes.append(plane if order == "words" else plane.swapaxes(-1, -2))
    lowest, highest = (int(kind[-1]),) * 2 if "-r" in kind else (1, 3)
    levels = rng.integers(lowest, highest + 1, (shape.batch, shape.blocks, shape.heads)).astype(np.int32)
    return Planes(tuple(planes), levels, order=order)


def abstract(kind: str, shape: Shape) -> Format:
    """As `make`, without contents: ShapeDtypeStructs, of any size."""
    one = make(kind, dataclasses.replace(shape, blocks=1), np.random.default_rng(0))

    def grow(x: np.ndarray) -> jax.ShapeDtypeStruct:
        # What is stored per block has the axes [L, B, N, K or 1, ...]; tables have fewer.
        size = (*x.shape[:2], shape.blocks, *x.shape[3:]) if x.ndim >= 5 else x.shape
        return jax.ShapeDtypeStruct(size, x.dtype)

    return jax.tree.map(grow, one)


def _half(x: Any) -> np.ndarray:
    return np.asarray(x, np.float16).view(np.uint16)


def query(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """`[B, K, G, H]` float32, scaled so that scores have a standard deviation of about 2."""
    x = rng.standard_normal((shape.batch, shape.heads, shape.group, shape.channels))
    return (x * 1.5 / np.sqrt(shape.channels)).astype(np.float32)


def rotation(shape: Shape, position: Any, theta: float = 10000.0) -> Rotation:
    """Llama's frequencies, a query at `position[B]`."""
    inv_freq = jnp.asarray(theta ** (-np.arange(0, shape.channels, 2) / shape.channels), jnp.float32)

    def angles(offsets):
        angle = offsets[..., None].astype(jnp.float32) * inv_freq.reshape((1,) * offsets.ndim + (-1,))
        return jnp.cos(angle), jnp.sin(angle)

    return Rotation(jnp.asarray(position, jnp.int32), angles)


def in_tpu_blocks(storage: Storage, shape: Shape) -> Shape:
    """The shape with as many tokens per block as a cache for TPU has of this storage, at least."""
    bits = (getattr(abstract(kind, shape), "bits", None) for kind in (storage.keys, storage.values))
    return dataclasses.replace(shape, tokens=max(shape.tokens, packing.tpu_block_tokens(bits)))
