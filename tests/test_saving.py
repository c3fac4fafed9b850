"""Saved caches: the same bits on any mesh and at any capacity."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CODEC_CASES, make_policy, small_model
from jax.sharding import NamedSharding
from saving_cases import LENGTHS, SHAPE, B, H, K, L, T, mesh_of, random_cache, same_bits

from kvjax import decode, saving, sharding
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from kvjax.presets import PRESETS
from kvjax.saving import facts, leaves
from kvjax.striped import order

FAMILIES = ("bf16", "int4", "kivi2", "kvquant3", "asymkv-1-0", "alignedkv", "fp8")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_bit_comes_back_on_another_mesh(name, tmp_path):
    aligned = name == "alignedkv"  # decides about blocks by those before them: seq=1 only
    meshes = {
        "bf16": ("seq=8", "seq=3", "data=2,seq=2,tensor=2", None),
        "kvquant3": (None, "seq=4,tensor=2", "data=2,seq=2,tensor=2", None),
        "alignedkv": (None, "data=2,tensor=2", None),
    }.get(name, ("tensor=2", "seq=4,tensor=2", None))
    cache = random_cache(name, meshes[0])
    tokens = np.arange(B * max(LENGTHS)).reshape(B, -1)
    for sizes in (*meshes[1:], *(() if aligned else (meshes[0],))):
        saving.save_cache(cache, tmp_path, tokens=tokens)
        loaded, text = saving.load_cache(tmp_path, SHAPE, mesh=mesh_of(sizes))
        fresh = decode.init_cache(
            SHAPE, make_policy(preset(name), L, K, H, name), batch=B, capacity=cache.capacity, block=T,
            mesh=mesh_of(sizes),
        )  # fmt: skip
        assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.committed == b.committed
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        same_bits(cache, loaded)
        np.testing.assert_array_equal(tokens, text)
        cache = loaded


@pytest.mark.parametrize("sizes", [None, "seq=2"])
def test_capacity_may_grow_and_shrink(sizes, tmp_path):
    cache = random_cache("int4", sizes)
    saving.save_cache(cache, tmp_path)
    for capacity, mesh in ((700, sizes), (212, sizes), (400, "seq=4"), (211, "seq=4")):
        loaded, text = saving.load_cache(tmp_path, SHAPE, capacity=capacity, mesh=mesh_of(mesh))
        assert capacity <= loaded.capacity < capacity + T * loaded.stripes and text is None
        same_bits(cache, loaded)
    with pytest.raises(ValueError, match=r"row 0 of the cache in .* holds 211 tokens; pass capacity=211 or more\."):
        saving.load_cache(tmp_path, SHAPE, capacity=150)


@pytest.mark.parametrize("name", ["kvquant3", "kivi2"])
def test_decoding_goes_on_with_the_same_logits(name, tmp_path):
    model = small_model()
    text = np.random.default_rng(0).integers(0, 64, (B, 70))
    cache = decode.init_cache(model, make_policy(preset(name), L, K, H, name), batch=B, capacity=160, block=T)
    _, cache = decode.score(model, cache, text)
    if name == "kvquant3":
        cache = decode.crop(cache, [70, 43])
    saving.save_cache(cache, tmp_path, model=model)
    wanted, cache = decode.score(model, cache, text)
    compiled = decode.cached.score._cache_size()
    loaded, _ = saving.load_cache(tmp_path, model)
    logits, loaded = decode.score(model, loaded, text)
    np.testing.assert_array_equal(logits, wanted)
    assert decode.cached.score._cache_size() == compiled  # a loaded cache is as good as one that was made here
    same_bits(cache, loaded)
    if name == "kvquant3":
        mesh = mesh_of("seq=2,tensor=2")
        spread, _ = saving.load_cache(tmp_path, model, mesh=mesh)
        logits, _ = decode.score(sharding.shard_model(model, mesh), spread, text)
        # Sums of other order: float32 rounding, and with it here and there another code of a new token.
        np.testing.assert_allclose(logits, wanted, atol=2e-3)
        assert np.median(np.abs(logits - wanted)) < 1e-5


@pytest.mark.parametrize("name", ["kivi4", "kvquant3"])
def test_heads_side_by_side_are_saved_for_any_target(name, tmp_path):
    """2 heads of 64 as one on TPU, as two on CPU and where each has a device of its own."""
    shape = decode.CacheShape(L, 4, 2, 64, make_rope(64, 2048))
    policy, rng = make_policy(preset(name), L, 2, 64, name), np.random.default_rng(0)
    cache = decode.init_cache(shape, policy, batch=B, capacity=300, target="tpu:v5e")

    def drawn(codec, block):
        def fill(leaf):
            x = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8).view(leaf.dtype)[..., 0]
            return jnp.asarray(x % 64 if leaf.dtype == jnp.uint8 else x)  # slots name channels of their head

        return codec.join(jax.tree.map(fill, codec.separate(block)))

    segment = cache.segments[0]
    segment = dataclasses.replace(segment, k=drawn(segment.k_codec, segment.k), v=drawn(segment.v_codec, segment.v))
    cache = dataclasses.replace(cache, segments=(segment,))
    saving.save_cache(cache, tmp_path / "tpu")
    for sizes, target in ((None, "cpu"), ("seq=2,tensor=2", "tpu:v5e")):
        plain, _ = saving.load_cache(tmp_path / "tpu", shape, policy, mesh=mesh_of(sizes), target=target)
        if sizes is None:
            for side in "kv":
                expected = getattr(segment, f"{side}_codec").separate(getattr(segment, side))
                assert_same(getattr(plain.segments[0], side), expected)
        saving.save_cache(plain, tmp_path / "plain")
        back, _ = saving.load_cache(tmp_path / "plain", shape, target="tpu:v5e")
        assert_same((back.segments[0].k, back.segments[0].v), (segment.k, segment.v))
        assert jax.tree.structure(back) == jax.tree.structure(cache)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_policy_comes_back_with_its_constants(tmp_path):
    cache = random_cache("kvquant3")
    saving.save_cache(cache, tmp_path)
    policy = saving.load_policy(tmp_path)
    assert facts.of_policy(policy) == facts.of_policy(make_policy(preset("kvquant3"), L, K, H))
    segment = cache.segments[0]
    for now, before in zip(
        jax.tree.leaves((policy.segments[0].k_params, policy.segments[0].v_params)),
        jax.tree.leaves((segment.k_params, segment.v_params)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(now).view("u4"), np.asarray(before).view("u4"))


def test_codecs_in_json():
    codecs = {*CODEC_CASES.values(), *(c for p in PRESETS.values() for c in (p.keys, p.values))}
    for codec in codecs:
        assert facts.to_codec(json.loads(json.dumps(facts.of_codec(codec)))) == codec
    with pytest.raises(ValueError, match="'sketch', which this version of kvjax has not"):
        facts.to_codec({"name": "sketch"})


def test_weights_come_back_on_another_mesh(tmp_path):
    model = small_model()
    for source, sizes in ((model, "seq=4,tensor=2"), ("spread", "tensor=2"), ("spread", None)):
        saving.save_model(spread if source == "spread" else source, tmp_path)
        mesh = mesh_of(sizes)
        spread = saving.load_model(tmp_path, mesh=mesh)
        assert spread.config == model.config and spread.fingerprint == model.fingerprint
        np.testing.assert_array_equal(spread.rope.inv_freq, model.rope.inv_freq)
        for name, x in spread.state.items():
            np.testing.assert_array_equal(np.asarray(x).view("u4"), np.asarray(model.state[name]).view("u4"))
            if mesh:
                assert x.sharding == sharding.model_shardings(model.config, mesh)[name]


def test_blocks_change_places_in_place():
    """Beyond the array itself, a device needs twice its share of one layer."""
    x = np.arange(4 * 2 * 16 * 2 * 8, dtype=np.uint32).reshape(4, 2, 16, 2, 8)
    mesh = mesh_of("data=2,seq=2,tensor=2")
    spec = sharding.spec("sealed", x)
    placed = jax.device_put(x[:, :, np.argsort(order(16, 4))], NamedSharding(mesh, spec))
    source = np.empty(16, np.int32)
    source[order(16, 2)] = order(16, 4)
    memory = leaves._move_in_place.lower(placed, source, mesh, spec).compile().memory_analysis()
    share = placed.nbytes // 4 // mesh.size
    assert memory.alias_size_in_bytes == placed.nbytes // mesh.size
    assert memory.temp_size_in_bytes <= 2 * share + 1024
    moved = leaves.restripe(placed, 16, 4, 16, mesh, spec)
    np.testing.assert_array_equal(np.asarray(moved)[:, :, order(16, 2)], x)
    assert leaves.restripe(moved, 16, 2, 16, mesh, spec) is moved


def test_checksums_know_bits_and_places():
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 4), np.uint8)
    start = leaves.digests({"x": x})
    assert leaves.digests({"x": np.pad(x, [(0, 0), (0, 0), (0, 5), (0, 0)])}) == start
    spread = jax.device_put(x, NamedSharding(mesh_of("seq=4,tensor=2"), jax.P(None, None, "seq", "tensor")))
    assert leaves.digests({"x": spread}) == start
    changed = {"swapped": x[:, :, ::-1], "turned": x[:, ::-1], "zero": x * np.uint8(0)}
    for bit in range(8):
        changed[f"bit {bit}"] = x.copy()
        changed[f"bit {bit}"][2, 1, 7, 3] ^= np.uint8(1 << bit)
    assert len(set(leaves.digests(changed).values()) | set(start.values())) == len(changed) + 1
    assert leaves.digests({"x": np.asarray([[1, 2]], np.uint32)}) == {
        "x": sum(v * (2 * i * leaves._PRIMES[1] + 1) for i, v in enumerate((1, 2))) % 2**32
    }


def test_orbax_says_nothing_unless_it_fails(tmp_path, capfd):
    saving.save_cache(random_cache("int4"), tmp_path)
    saving.load_cache(tmp_path, SHAPE)
    assert capfd.readouterr() == ("", "")
