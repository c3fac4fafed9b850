"""Loading and saving: round trips, shards, dtypes, fingerprints, and one-line errors for damaged checkpoints."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from model.variants import VARIANTS
from safetensors.numpy import load_file, save_file

from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward
from kvjax.model.llama import weight_shapes
from kvjax.model.rope import make_rope, rope_from_config
from kvjax.model.weights import ASSETS, init_random, load, save

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    layers=3, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=16, vocab=64, bos_id=0, eos_ids=(1, 5)
)
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, make_rope(16, 2048, rope_type="linear", factor=2.0), seed=0)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    return save(model, tmp_path / "model")


def edit_config(directory: Path, **changes):
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "remove"}))


def edit_tensors(directory: Path, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def split(directory: Path):
    """Turns model.safetensors into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same_weights(a, b):
    assert a.state.keys() == b.state.keys()
    for name in a.state:
        assert a.state[name].dtype == b.state[name].dtype
        np.testing.assert_array_equal(a.state[name], b.state[name])


def test_round_trip(model, saved):
    loaded = load(saved)
    assert_same_weights(model, loaded)
    assert loaded.config == CONFIG and loaded.rope.parameters == model.rope.parameters
    np.testing.assert_array_equal(loaded.rope.inv_freq, model.rope.inv_freq)
    assert loaded.path == str(saved) and loaded.fingerprint == model.fingerprint
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(model, tmp_path, stored):
    """None means float32 on the CPU, where the tests run; the fingerprint is that of the file either way."""
    directory = save(model, tmp_path, stored)
    assert {str(x.dtype) for x in load_file(directory / "model.safetensors").values()} == {stored}
    automatic, kept = load(directory), load(directory, stored)
    assert automatic.dtype == jnp.float32 and kept.dtype == jnp.dtype(stored)
    assert_same_weights(kept, model.with_state({n: x.astype(stored) for n, x in model.state.items()}))
    assert automatic.fingerprint == kept.fingerprint
    assert load(directory, jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"`dtype='int8'` is not supported; use float32, bfloat16 or float16."):
        load(directory, "int8")


def test_shards(model, saved):
    split(saved)
    assert_same_weights(model, load(saved))
    assert load(saved).fingerprint == model.fingerprint


def test_fingerprint_sees_weights_and_rope_but_not_token_ids(model, saved):
    fingerprint = load(saved).fingerprint
    assert len(fingerprint) == 64
    edit_config(saved, eos_token_id=7)
    assert load(saved).fingerprint == fingerprint
    edit_config(saved, rms_norm_eps=1e-4)
    assert load(saved).fingerprint != fingerprint
    edit_config(saved, rms_norm_eps=CONFIG.norm_eps, rope_parameters={"rope_type": "linear", "factor": 3.0})
    assert load(saved).fingerprint != fingerprint
    changed = model.with_state({**model.state, "k": model.state["k"].at[2, 0, 0, 0].add(1e-3)})
    assert changed.fingerprint != model.fingerprint


def test_large_tensors_are_sampled(tmp_path):
    """A tensor over 64 KiB: the same from file and memory, and a change at either end is noticed."""
    config = ModelConfig(layers=1, width=64, mlp_width=8, q_heads=1, kv_heads=1, head_dim=8, vocab=1000)
    model = init_random(config, make_rope(8, 64), seed=1)
    assert load(save(model, tmp_path)).fingerprint == model.fingerprint
    for at in (0, -1):
        embedding = model.state["embedding"].at[at, at].add(1)
        assert model.with_state({**model.state, "embedding": embedding}).fingerprint != model.fingerprint


def test_random_weights_depend_on_the_seed_alone(model):
    again = init_random(CONFIG, model.rope, seed=0)
    assert_same_weights(model, again)
    assert init_random(CONFIG, model.rope, seed=1).fingerprint != model.fingerprint
    q = np.asarray(model.state["q"])
    assert q.std() == pytest.approx(CONFIG.initializer_range, rel=0.05) and abs(q.mean()) < 0.001
    assert np.all(np.asarray(model.state["mlp_norm"]) == 1)
    assert init_random(CONFIG, model.rope, seed=0, dtype="bfloat16").dtype == jnp.bfloat16


def test_stacks_are_placed_one_by_one(saved):
    """No stack of the host outlives its placing: there is never a second copy of the model."""
    shapes, alive = {}, []

    def place(name, stack):
        assert all(stack() is None for stack in alive), name
        alive.append(weakref.ref(stack))
        shapes[name] = stack.shape
        return jnp.zeros(())

    load(saved, place=place)
    assert shapes == weight_shapes(CONFIG)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_config_json_reads_as_transformers_reads_it(variant):
    theirs = variant.config()
    assert ModelConfig.from_transformers(variant.raw) == ModelConfig.from_transformers(theirs)
    assert rope_from_config(variant.raw).parameters == rope_from_config(theirs).parameters
    from_empty = {name: variant.raw[name] for name in ("model_type", "architectures")}
    assert ModelConfig.from_transformers(from_empty) == ModelConfig.from_transformers(type(theirs)())


@pytest.mark.parametrize("name", ["attention-bias", "tied", "rope-llama3", "rope-dynamic", "mistral-window8"])
def test_transformers_loads_what_we_save_and_we_what_it_saves(tmp_path, name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    variant = next(v for v in VARIANTS if v.name == name)
    model, tokens = variant.loaded(), np.asarray([[3, 14, 15, 9, 26, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]])
    theirs = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "ours"), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(model, jnp.asarray(tokens)), expected, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    back = load(tmp_path / "theirs")
    assert_same_weights(back, model)
    assert back.fingerprint == model.fingerprint


def test_eos_ids_of_the_generation_config_win(saved):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load(saved).config.eos_ids == (3, 4)


def test_redundant_tensors_are_accepted(model, saved):
    """Rotary frequencies in old checkpoints, and the second name of a tied embedding."""
    edit_tensors(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    assert_same_weights(load(saved), model)
    edit_config(saved, tie_word_embeddings=True)
    edit_tensors(saved, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "head" not in load(saved).state
    edit_tensors(saved, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding although config.json ties"):
        load(saved)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


def truncate(directory: Path):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def forget_a_shard(directory: Path):
    split(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def empty_a_shard(directory: Path):
    split(directory)
    save_file({}, directory / "model-00002-of-00002.safetensors")


def only_pickles(directory: Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list"),
        (only_pickles, "has no .*safetensors .only pytorch_model.bin.; .*save_pretrained"),
        (truncate, "model.safetensors is no complete safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"not a safetensors file"),
            "model.safetensors is no complete",
        ),
        (forget_a_shard, "model-00002-of-00002.safetensors is missing, but the checkpoint's index names it"),
        (empty_a_shard, "model-00002-of-00002.safetensors has no tensor"),
        (lambda d: edit_tensors(d, lambda t: t.pop(K_PROJ)), f"has no tensor {K_PROJ}"),
        (lambda d: edit_tensors(d, lambda t: t.update(extra=t[K_PROJ])), "model.safetensors: tensor extra is not part"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({K_PROJ: np.zeros((31, 32), np.float32)})),
            rf"model.safetensors: {K_PROJ} has shape \(31, 32\); config.json implies \(32, 32\)",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({K_PROJ: t[K_PROJ].astype(ml_dtypes.float8_e4m3fn)})),
            f"stores {K_PROJ} as F8_E4M3, which is not supported .quantized",
        ),
    ],
)
def test_damaged_checkpoints_end_in_one_line(saved, damage, complaint):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint) as caught:
        load(saved)
    assert str(saved) in one_line(caught)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "architecture 'Qwen2ForCausalLM' is not supported; supported are Llama",
        ),
        ({"architectures": "remove", "model_type": "gemma"}, "architecture 'gemma' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification' is not supported"),
        ({"hidden_act": "gelu"}, "`hidden_act='gelu'` is not supported; supported is silu"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "`rope_type='longrope'` is not supported; supported are default",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mixes full_attention, sliding_attention"),
        ({"num_key_value_heads": 3}, "`kv_heads=3` must divide q_heads=4"),
        ({"hidden_size": "many"}, "`hidden_size='many'` must be a positive integer"),
        ({"num_hidden_layers": 0}, "`layers=0` must be a positive integer"),
    ],
)
def test_unsupported_configs_end_in_one_line(saved, changes, complaint):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=complaint) as caught:
        load(saved)
    assert str(saved / "config.json") in one_line(caught)


def test_sources(model, saved, monkeypatch):
    """A directory, a hub id (through its client), and what is neither."""
    asked = []

    def download(hub_id, **patterns):
        asked.append((hub_id, patterns["allow_patterns"]))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_weights(load("some-one/a-model"), model)
    assert asked[0][0] == "some-one/a-model" and "*.safetensors" in asked[0][1]
    assert_same_weights(load(str(saved)), model)
    for wrong in ("nothing-of-this-name", "/no/such/directory", Path("no/such")):
        with pytest.raises(FileNotFoundError, match="is no directory; pass one in Hugging Face layout") as caught:
            load(wrong)
        one_line(caught)
    with pytest.raises(ValueError, match="is a file; pass the directory") as caught:
        load(saved / "config.json")
    one_line(caught)


def test_hub_errors_end_in_one_line(monkeypatch, tmp_path):
    """The session is offline (conftest.py) and the cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"huggingface_hub cannot fetch it .*pass a local directory") as caught:
        load("no-such-organisation/no-such-model")
    one_line(caught)


def test_tiny_ships_with_the_library():
    if not (ASSETS / "tiny" / "model.safetensors").is_file():
        pytest.skip("the model is not in this checkout")
    tiny = load("tiny")
    assert tiny.config.head_dim == 64 and tiny.dtype == jnp.float32


def test_import_is_light():
    """Importing the library pulls in neither torch nor transformers nor the hub's client."""
    code = (
        "import sys, kvjax, kvjax.model.forward, kvjax.model.weights, kvjax.model.llama2c;"
        "print(*({'torch', 'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
