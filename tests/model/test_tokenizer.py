"""The tokenizer is read from the model's directory, lazily, with or without tokenizer_config.json."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random, load, save

CONFIG = ModelConfig(
    layers=1, width=16, mlp_width=16, q_heads=1, kv_heads=1, head_dim=16, vocab=258, bos_id=0, eos_ids=(1,)
)
TEXT = "Two  spaces, a naïve café, 漢字 and\na line break."
TRAINED = Path(__file__).parents[3] / "shared" / "models" / "tiny"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model whose tokenizer knows the 256 bytes."""
    tokenizer = Tokenizer(BPE({c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {"<s>": 0, "</s>": 1}
    path = save(init_random(CONFIG, make_rope(16, 64), seed=0), tmp_path)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def check(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode()) and min(ids) >= 2  # no BOS
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_tokenizer_json_alone_gets_its_ends_from_the_config(directory):
    model = load(directory)
    check(model.tokenizer)
    assert model.tokenizer is load(directory).tokenizer  # read once per directory


def test_tokenizer_config_is_honoured(directory):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    check(load(directory).tokenizer)


def test_missing_or_damaged_tokenizers_end_in_one_line(directory):
    in_memory = init_random(CONFIG, make_rope(16, 64), seed=0)
    with pytest.raises(ValueError, match="built in memory and has no tokenizer"):
        _ = in_memory.tokenizer
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read") as caught:
        _ = load(directory).tokenizer
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json or tokenizer\.model"):
        _ = load(directory).tokenizer


@pytest.mark.skipif(not TRAINED.is_dir(), reason=f"{TRAINED} is absent: it is not part of the repository")
def test_trained_model_round_trips_text_and_adds_no_bos():
    tokenizer = load(TRAINED).tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    assert 0 not in ids and tokenizer.decode(ids) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
