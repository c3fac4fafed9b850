"""Saved caches: the same bits on any mesh, the former save whatever is killed, and one line for what is damaged."""

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import CODEC_CASES, make_policy, small_model
from jax.sharding import NamedSharding
from orbax.checkpoint._src.serialization import serialization

from kvjax import decode, saving, sharding
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from kvjax.presets import PRESETS
from kvjax.saving import facts, leaves
from kvjax.striped import order

L, B, K, G, H, T = 2, 2, 2, 2, 32, 32
SHAPE = decode.CacheShape(L, K * G, K, H, make_rope(H, 2048))
LENGTHS = (211, 131)
FAMILIES = ("bf16", "int4", "kivi2", "kvquant3", "asymkv-1-0", "alignedkv", "fp8")


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


@pytest.fixture
def held(monkeypatch):
    """Arrays are written to disk when this event is set."""
    event, write = threading.Event(), serialization.async_serialize_from_host

    async def wait_and_write(*args, **kwargs):
        while not event.is_set():
            await asyncio.sleep(0.01)
        return await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", wait_and_write)
    yield event
    event.set()


@pytest.mark.parametrize("sizes", [None, "seq=2,tensor=2"])
def test_a_saved_cache_may_be_donated_before_it_is_written(sizes, tmp_path, held):
    cache = random_cache("int4", sizes)
    before = random_cache("int4", sizes)
    saved = saving.save_cache(cache, tmp_path, wait=False)
    overwrite = jax.jit(lambda c: jax.tree.map(lambda x: ~x if x.dtype.kind in "iu" else -x, c), donate_argnums=0)
    for _ in range(3):
        cache = overwrite(cache)
    jax.block_until_ready(cache)
    held.set()
    saved.wait()
    same_bits(before, saving.load_cache(tmp_path, SHAPE, mesh=mesh_of(sizes))[0])


def test_the_former_save_is_read_until_the_new_one_is_complete(tmp_path, held):
    held.set()
    saving.save_cache(random_cache(seed=1), tmp_path)
    held.clear()
    second = saving.save_cache(random_cache(seed=2), tmp_path, wait=False)
    assert not second.seconds
    same_bits(random_cache(seed=1), saving.load_cache(tmp_path, SHAPE)[0])
    held.set()
    saving.save_cache(random_cache(seed=3), tmp_path, wait=False).wait()  # waits for the second first
    assert second.seconds and second.nbytes
    same_bits(random_cache(seed=3), saving.load_cache(tmp_path, SHAPE)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["cache_3"]


CHILD = """
import sys
sys.path[:0] = ["tests", "."]
import jax
jax.config.update("jax_num_cpu_devices", 2)
import test_saving as t
directory = sys.argv[1]
"""
KILLED = (
    CHILD
    + """
import asyncio, time
t.saving.save_cache(t.random_cache("int4", seed=1), directory)
async def never(*args, **kwargs):
    await asyncio.sleep(600)
t.serialization.async_serialize_from_host = never
t.saving.save_cache(t.random_cache("int4", seed=2), directory, wait=False)
print("saving", flush=True)
time.sleep(600)
"""
)
ONE_OF_TWO = (
    CHILD
    + """
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[2]), initialization_timeout=60)
tokens = t.np.arange(2 * 211).reshape(2, -1)
cache = t.random_cache("int4", "seq=2,tensor=2")
saved = t.saving.save_cache(cache, directory, tokens=tokens, wait=False)
saved.wait()
loaded, text = t.saving.load_cache(directory, t.SHAPE, mesh=t.mesh_of("data=2,tensor=2"))
assert (text == tokens).all()
print(loaded.capacity, [shard.data.shape[1] for shard in loaded.segments[0].k.codes.addressable_shards], flush=True)
"""
)


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=Path(__file__).parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_killed_while_saving_the_former_save_is_whole(tmp_path):
    child = start(KILLED, tmp_path)
    try:
        assert child.stdout.readline() == "saving\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert {p.name.split(".")[0] for p in tmp_path.iterdir()} == {"cache_1", "cache_2"}
    same_bits(random_cache("int4", seed=1), saving.load_cache(tmp_path, SHAPE)[0])
    saving.save_cache(random_cache("int4", seed=3), tmp_path)
    same_bits(random_cache("int4", seed=3), saving.load_cache(tmp_path, SHAPE)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["cache_2"]  # what was half written is gone


def test_two_processes_save_what_one_loads(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children = [start(ONE_OF_TWO, tmp_path, process, address) for process in range(2)]
    try:
        for child in children:
            out, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors[-2000:]
            assert out.endswith("320 [1, 1]\n")
    finally:
        for child in children:
            child.kill()
    loaded, _ = saving.load_cache(tmp_path, SHAPE)
    same_bits(random_cache("int4"), loaded)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whatever_file_is_missing_or_cut_is_named(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    saving.save_cache(random_cache("int4"), whole)
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
    assert any(p.parts[-2] == "d" for p in files)
    for file in files:
        if file.parts[1:] in (("_CHECKPOINT_METADATA",), ("commit_success.txt",)):
            continue  # of Orbax's own; nothing is read from them
        for keep in (None, 0, 0.5):
            shutil.copytree(whole, broken)
            content = (broken / file).read_bytes()
            (broken / file).unlink()
            if keep is not None:
                (broken / file).write_bytes(content[: int(keep * len(content))])
            with pytest.raises(ValueError, match="broken") as error:
                saving.load_cache(broken, SHAPE)
            assert file.name in one_line(error) and "save it again" in one_line(error)
            shutil.rmtree(broken)


def test_a_flipped_bit_is_noticed(tmp_path):
    saving.save_cache(random_cache("int4"), tmp_path)
    largest = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    with pytest.raises(ValueError, match=r"cache_1 is damaged \(.*\); save it again") as error:
        saving.load_cache(tmp_path, SHAPE)
    one_line(error)


def test_what_is_no_saved_cache_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    ocp.StandardCheckpointer().save(tmp_path / "foreign" / "0", {"a": jnp.zeros(3)})
    saving.save_model(small_model(), tmp_path / "model")
    saving.save_cache(random_cache("int4"), tmp_path / "future")
    metadata = tmp_path / "future" / "cache_1" / "facts" / "metadata"
    content = metadata.read_text()
    assert '"format": 1' in content
    metadata.write_text(content.replace('"format": 1', '"format": 7'))
    for name, message in {
        "nowhere": "does not exist",
        "file": "is a file",
        "empty": "holds no saved cache (it has nothing)",
        "foreign": "holds no saved cache (it has 0",
        "model": "holds no saved cache (it has model_1)",
        "future": "in format 7, and this version of kvjax reads 1",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            saving.load_cache(tmp_path / name, SHAPE)
        assert message in one_line(error) and name in one_line(error)
    with pytest.raises(ValueError, match="is a file"):
        saving.save_cache(random_cache("int4"), tmp_path / "file")
    with pytest.raises(OSError, match="could not be written") as error:
        saving.save_cache(random_cache("int4"), tmp_path / "file" / "below")
    one_line(error)


def test_another_model_or_policy_is_refused_by_the_first_difference(tmp_path):
    model = small_model()
    cache = random_cache("int4")
    cache = dataclasses.replace(cache, shape=decode.shape_of(model))
    saving.save_cache(cache, tmp_path, model=model)
    other = model.with_state({n: x + 1 for n, x in model.state.items()})
    wide = dataclasses.replace(SHAPE, kv_heads=4)
    turned = dataclasses.replace(SHAPE, rope=make_rope(H, 2048, rope_theta=5e5))
    int3, kivi = (make_policy(preset(n), L, K, H, n) for n in ("int3", "kivi4"))
    for arguments, message in [
        ((wide,), "`model` has kv_heads=4, and the cache in"),
        ((turned,), "`model` has rope.inv_freq.1=0."),
        ((other,), "`model` has other weights (fingerprint"),
        ((SHAPE, int3), "`policy` 'int3' has segments.0.keys.bits=3, and the cache in"),
        ((SHAPE, kivi), "`policy` 'kivi4' has segments.0.keys.group=32, and the cache in"),
    ]:
        with pytest.raises(ValueError) as error:
            saving.load_cache(tmp_path, *arguments)
        assert message in one_line(error)
    with pytest.raises(ValueError, match="other weights"):
        saving.read_facts(tmp_path, other)
    saving.load_cache(tmp_path, model, make_policy(preset("int4"), L, K, H, "of another name"))
    gone = jax.jit(lambda c: jax.tree.map(lambda x: x + x, c), donate_argnums=0)
    gone(cache)
    with pytest.raises(ValueError, match="was consumed"):
        saving.save_cache(cache, tmp_path)
    with pytest.raises(ValueError, match=r"`tokens` of shape \(3, 4\)"):
        saving.save_cache(random_cache("int4"), tmp_path, tokens=np.zeros((3, 4), int))


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
