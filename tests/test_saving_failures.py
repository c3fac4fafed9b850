"""Saving what is killed, damaged or of another model: the former save stays, and one line says what is wrong."""

import asyncio
import dataclasses
import os
import re
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
from cases import make_policy, small_model
from orbax.checkpoint._src.serialization import serialization
from saving_cases import SHAPE, H, K, L, mesh_of, random_cache, same_bits

from kvjax import decode, saving
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from kvjax.saving.facts import FORMAT


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
import test_saving_failures as t
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
    assert f'"format": {FORMAT}' in content
    metadata.write_text(content.replace(f'"format": {FORMAT}', '"format": 7'))
    for name, message in {
        "nowhere": "does not exist",
        "file": "is a file",
        "empty": "holds no saved cache (it has nothing)",
        "foreign": "holds no saved cache (it has 0",
        "model": "holds no saved cache (it has model_1)",
        "future": f"in format 7, and this version of kvjax reads {FORMAT}",
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
    for shape in ((3, 4), (2, 210)):
        with pytest.raises(
            ValueError, match=re.escape(f"`tokens` of shape {shape} and type int64 must be integers (2, 211)")
        ):
            saving.save_cache(random_cache("int4"), tmp_path, tokens=np.zeros(shape, int))
