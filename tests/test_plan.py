"""Plans against the arrays that exist, KVQuant's own figures, and searches that hold at both sides of their answers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from cases import make_policy

from kvjax import decode, sharding
from kvjax.cache import CacheShape
from kvjax.chips import CHIPS, Chip, parse_devices, tiled_bytes, tiled_order
from kvjax.model.config import ModelConfig
from kvjax.model.known import KNOWN, model_config
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.plan import PARTS, meshes, plan
from kvjax.plan_search import Question, break_even, choose, fewest_devices, largest_context, way_out
from kvjax.policy import preset

SMALL = ModelConfig(layers=3, width=64, mlp_width=96, q_heads=8, kv_heads=4, head_dim=32, vocab=128)
HOST = Chip("host", "cpu", memory=1 << 22, bandwidth=1e9, interconnect=1e8, flops=1e10)  # of arrays as they are
LLAMA_7B = KNOWN["llama-7b"]


def local_bytes(tree):
    """What the first device holds of the arrays of a tree."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("name", ["kvquant3", "kivi2", "bf16"])
@pytest.mark.parametrize("axes", ["", "data=2,seq=2,tensor=2"])
def test_a_plan_is_what_is_allocated(name, axes):
    sizes = sharding.parse_mesh(axes)
    mesh = sharding.make_mesh(sizes)
    rope = make_rope(SMALL.head_dim, 4096)
    shape = CacheShape(SMALL.layers, SMALL.q_heads, SMALL.kv_heads, SMALL.head_dim, rope)
    policy = make_policy(preset(name), SMALL.layers, SMALL.kv_heads, SMALL.head_dim)
    cache = decode.init_cache(shape, policy, batch=2, capacity=900, dtype=jnp.bfloat16, target="cpu", mesh=mesh)
    model = sharding.shard_model(init_random(SMALL, rope, 0, jnp.bfloat16), mesh)
    found = plan(SMALL, name, 900, HOST, mesh.size, batch=2, mesh=sizes)
    parts = dict(found.parts)
    assert parts.pop("weights") == local_bytes(model.state)
    del parts["temporaries"]
    assert sum(parts.values()) == local_bytes(cache)
    assert parts["recent"] == sum(local_bytes((s.k_recent, s.v_recent)) for s in cache.segments) + local_bytes(
        cache.pending
    )
    assert parts["sinks"] == sum(local_bytes((s.k_sinks, s.v_sinks)) for s in cache.segments)
    assert found.capacity == cache.capacity and found.bits_per_element == decode.bits_per_element(cache)
    assert found.nbytes == decode.nbytes(cache)


def test_parts_of_kvquant2_at_llama_7b_by_hand():
    """1,048,576 tokens: 32 layers x 2 x 4096 x 2 bits; scale and zero per value token; 2 slots of 24 bits per head."""
    parts = plan(LLAMA_7B, "kvquant2", 1 << 20, CHIPS["a100-80"], 1).parts
    assert tuple(parts) == PARTS
    tokens = 1 << 20
    assert parts["codes"] == 32 * 2 * 4096 * tokens // 4
    assert parts["metadata"] == 32 * 2 * 2 * tokens
    assert parts["outliers"] == 32 * 2 * 32 * 2 * 3 * tokens
    assert parts["recent"] == 2 * 32 * 4096 * 2 * (128 + 1)
    assert parts["weights"] == 2 * (2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096)


def test_the_papers_contexts():
    """KVQuant, Table 8: 64.1 and 611.5 GiB of nuq2. 1M tokens on one A100-80GB hold without outliers only; 10M on eight
    need more than a program gets of them."""
    one = plan(LLAMA_7B, "kvquant2-dense", 1 << 20, CHIPS["a100-80"], 1)
    assert one.fits and one.nbytes / 2**30 == pytest.approx(64.1, abs=0.1)
    assert not plan(LLAMA_7B, "kvquant2", 1 << 20, CHIPS["a100-80"], 1).fits
    ten = plan(LLAMA_7B, "kvquant2-dense", 10**7, CHIPS["a100-80"], 8)
    assert ten.nbytes / 2**30 == pytest.approx(611.5, abs=0.2)
    assert not ten.fits and 0 < -ten.spare < 2 << 30
    assert plan(LLAMA_7B, "kvquant2-dense", 10**7, CHIPS["h200"], 8).fits
    assert plan(LLAMA_7B, "kvquant2-dense", 10**7, CHIPS["v5p"], 8).fits


def test_the_mesh_of_a_plan_is_the_best_of_all():
    question = Question(KNOWN["llama-3-8b"], CHIPS["v5e"])
    every = [question.plan("kvquant3", 10**7, 32, mesh) for mesh in meshes(question.config, 32, 1)]
    assert [p.mesh["tensor"] for p in every] == [1, 2, 4, 8] and {p.devices for p in every} == {32}
    chosen = question.plan("kvquant3", 10**7, 32)
    assert chosen.times().total == min(p.times().total for p in every if p.fits)
    nothing_fits = question.plan("bf16", 10**7, 32)
    assert nothing_fits.needed == min(question.plan("bf16", 10**7, 32, p.mesh).needed for p in every)
    with pytest.raises(ValueError, match="tensor=16 must divide"):
        question.plan("kvquant3", 10**7, 32, {"seq": 2, "tensor": 16})


def test_a_method_that_cannot_be_spread_takes_the_meshes_it_can():
    assert plan(SMALL, "alignedkv", 900, HOST, 4).mesh == {"data": 1, "seq": 1, "tensor": 4}
    assert largest_context(Question(SMALL, HOST), "alignedkv", 4) > 900
    with pytest.raises(NotImplementedError, match="use seq=1"):
        plan(SMALL, "alignedkv", 900, HOST, 8)


def test_times_by_hand():
    found = plan(SMALL, "bf16", 1025, HOST, 4, batch=2, mesh={"seq": 2, "tensor": 2})
    times = found.times()
    assert times.memory == found.read / 1e9 and times.compute == found.flops / 1e10
    assert found.sent["seq"] == (6, 3 * 2 * 4 * (32 + 2) * 4)  # layers x rows x own q heads x (channels, max, sum)
    assert found.sent["tensor"][0] == 2 * 3 + 1
    assert times.interconnect == pytest.approx(sum(size for _, size in found.sent.values()) / 1e8)  # 2 (n - 1) / n = 1
    assert times.total == max(times.memory, times.compute) + times.interconnect + times.latency
    # Weights but for the embedding, 8 sealed blocks, the rest once.
    in_blocks = 3 * 2 * 2 * 1024 * 4 * 32 * 2 // 4
    lookup = SMALL.vocab * SMALL.width * 2 // 2
    rest = found.parts["recent"] + found.parts["tables"] + found.parts["weights"] - lookup
    assert found.read == in_blocks + rest
    assert plan(SMALL, "kvquant3", 1025, HOST, 4, mesh={"tensor": 4}).sent["tensor"][0] == 2 * 3 + 1 + 4 * 3


@pytest.mark.parametrize("mesh", [{}, {"seq": 4, "tensor": 2}])
@pytest.mark.parametrize("chip", [HOST, dataclasses.replace(CHIPS["v5e"], memory=5 << 20)])
def test_the_largest_context_fits_and_one_more_token_does_not(chip, mesh):
    question, devices = Question(SMALL, chip), math.prod(mesh.values())
    longest = largest_context(question, "kivi2", devices, mesh)
    assert question.plan("kivi2", longest, devices, mesh).fits
    assert not question.plan("kivi2", longest + 1, devices, mesh).fits
    assert largest_context(Question(SMALL, dataclasses.replace(chip, memory=1 << 16)), "kivi2", devices, mesh) == 0


def test_searches():
    question = Question(KNOWN["llama-3-70b"], CHIPS["v5p"])
    assert fewest_devices(question, "kvquant3", 10**7) == 16
    assert not question.plan("kvquant3", 10**7, 8).fits
    ways = way_out(question, question.plan("kvquant3", 10**7, 8), largest_context(question, "kvquant3", 8))
    assert ways.startswith("16 devices, or kivi2 (3.00 bits), or at most ")
    found = choose(question, 10**7, 16)
    assert found.best.quant == "kivi4" and [p.quant for p in found.plans][:3] == ["bf16", "int8", "kivi4"]
    assert choose(question, 10**7, 16, max_bits=4.5).best.quant == "kvquant4"
    assert choose(question, 10**8, 1).best is None


def test_break_even():
    question = Question(SMALL, HOST)
    found = {}
    for name in ("kvquant3", "kivi2"):
        found[name] = tokens = break_even(question, name, 1, {})
        assert question.plan(name, tokens, 1).needed < question.plan("bf16", tokens, 1).needed
        if tokens > 128:
            assert question.plan(name, tokens - 128, 1).needed >= question.plan("bf16", tokens - 128, 1).needed
    assert found["kvquant3"] == 128 and found["kivi2"] > 128  # a window of its own waits in the ring
    assert break_even(question, "alignedkv", 1, {}) is None


def test_tiles_of_a_tpu_by_hand():
    assert tiled_bytes((32, 1, 8192, 32, 8, 128), 4) == 32 * 8192 * 32 * 8 * 128 * 4  # whole tiles
    assert tiled_bytes((2, 3, 24, 64), 4) == 2 * 3 * 24 * 128 * 4  # lanes
    assert tiled_bytes((7, 5), 4) == 8 * 128 * 4
    assert tiled_bytes((32, 4), 4) == 4 * 128 * 4  # turned round: 4 rows of 32 lanes
    assert tiled_bytes((1,), 4) == tiled_bytes((), 4) == 512
    assert tiled_bytes((300,), 4) == 2048
    assert tiled_bytes((2, 0, 128), 2) == 0
    assert tiled_order((32, 1, 1024, 8, 16, 128), 4) == (0, 1, 2, 3, 4, 5)
    # Two rows of bytes fill no words; eight heads do.
    assert tiled_order((32, 1, 1024, 8, 2, 128), 1) == (0, 1, 2, 4, 3, 5)
    assert tiled_order((32, 1, 1024, 1, 128), 2) == (0, 1, 3, 2, 4)  # rows of 1,024 blocks
    assert tiled_order((32, 4), 4) == (1, 0)
    assert tiled_order((300,), 4) == (0,)


def test_devices():
    assert parse_devices("v5e:256") == (CHIPS["v5e"], 256)
    assert parse_devices("h100") == (CHIPS["h100"], None)
    chip, count = parse_devices("v5p:2", {"memory": 8e10, "bandwidth": None})
    assert (chip.memory, chip.bandwidth, count) == (80_000_000_000, CHIPS["v5p"].bandwidth, 2)
    own = {"memory": 8e10, "bandwidth": 2e12, "interconnect": 5e10, "flops": 3e14}
    assert parse_devices("mine:8", own)[0].target == "reference"
    for text, message in (
        ("v5e:0", "must be a number"), ("v5e:-1", "must be a number"), ("v4:8", "none of v5e"), ("", "no chip is none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_devices(text)
    with pytest.raises(ValueError, match="`flops=-1` must be a positive number"):
        parse_devices("v5e:1", {"flops": -1.0})


def test_models(tmp_path):
    assert model_config("LLaMA-7B") is LLAMA_7B
    assert model_config("tiny").layers == 5
    with pytest.raises(FileNotFoundError, match="or one of llama-7b"):
        model_config(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="must all be at least 1"):
        plan(SMALL, "bf16", 0, HOST, 1)
