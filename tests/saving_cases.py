"""Caches with known bits, and what it means that two hold the same."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import make_policy

from kvjax import decode, sharding
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from kvjax.saving import leaves
from kvjax.striped import order

L, B, K, G, H, T = 2, 2, 2, 2, 32, 32
SHAPE = decode.CacheShape(L, K * G, K, H, make_rope(H, 2048))
LENGTHS = (211, 131)


def mesh_of(sizes):
    return sharding.make_mesh(sizes) if sizes else None


def random_cache(name="kvquant3", sizes=None, capacity=300, seed=0, lengths=LENGTHS):
    """A cache with random bits in every leaf, those of each block the same on any mesh; and these bits by name."""
    policy = make_policy(preset(name), L, K, H, name)
    cache = decode.init_cache(SHAPE, policy, batch=B, capacity=capacity, block=T, mesh=mesh_of(sizes))
    rng = np.random.default_rng(seed)
    drawn = {}

    def fill(name, leaf):
        if name.startswith(("shape", "pending")) or not leaf.size:
            return leaf
        if name == "length":
            x = np.asarray(lengths, np.int32)
        elif name.split(".")[2:3] in (["k"], ["v"]):
            x = rng.integers(0, 256, (40, *np.delete(leaf.shape, 2), leaf.dtype.itemsize), np.uint8)
            x = x[: leaf.shape[2]].view(leaf.dtype)[..., 0]
            stored = np.empty_like(x)
            stored[order(len(x), cache.stripes)] = x
            x = np.moveaxis(stored, 0, 2)
        else:
            x = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8).view(leaf.dtype)[..., 0]
        return jax.make_array_from_callback(x.shape, leaf.sharding, lambda at: x[at]) if sizes else jnp.array(x)

    drawn = {name: fill(name, leaf) for name, leaf in leaves.named(cache).items()}
    return jax.tree.unflatten(jax.tree.structure(cache), drawn.values())


def bits(cache):
    """Every leaf's bytes by name, sealed blocks in the order of the context."""
    out = {}
    for name, leaf in leaves.named(cache).items():
        x = np.asarray(leaf)
        if name.split(".")[2:3] in (["k"], ["v"]):
            x = x[:, :, order(x.shape[2], cache.stripes)]
        out[name] = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
    return out


def same_bits(a, b, blocks=None):
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        if name.split(".")[2:3] in (["k"], ["v"]):
            both = min(x.shape[2], y.shape[2]) if blocks is None else blocks
            assert not y[:, :, x.shape[2] :].any()
            x, y = x[:, :, :both], y[:, :, :both]
        np.testing.assert_array_equal(x, y, err_msg=name)
