"""The stories260K model of llama2.c: converted, it computes what a float64 forward pass of the original computes."""

import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.model.llama2c as llama2c
from kvjax.model.forward import forward, forward_with_kv
from kvjax.model.rope import cos_sin, rotate
from kvjax.model.weights import load

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
MODEL, TOKENIZER = DATA / "stories260K.bin", DATA / "stories260K-tok512.bin"
needs_data = pytest.mark.skipif(not MODEL.is_file(), reason=f"{MODEL} is absent: it is not part of the repository")


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((DATA / "stories260K-reference.json").read_text())


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return load(llama2c.convert(MODEL, TOKENIZER, tmp_path_factory.mktemp("stories")))


@needs_data
def test_logits_and_kv_equal_the_reference(stories, reference):
    tokens = jnp.asarray([reference["ids"]])
    logits, k, v = forward_with_kv(stories, tokens)
    np.testing.assert_allclose(logits[0, -1, :8], reference["logits_last_first8"], atol=1e-4)
    assert int(logits[0, -1].argmax()) == reference["logits_last_argmax"]
    norms = [np.linalg.norm(logits)], [np.linalg.norm(x) for x in k], [np.linalg.norm(x) for x in v]
    for ours, theirs in zip(norms, ([reference["logits_l2"]], reference["k_l2"], reference["v_l2"]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    cos, sin = cos_sin(stories.rope, jnp.arange(tokens.shape[1])[None])
    key = rotate(k[0], cos[:, :, None], sin[:, :, None])[0, 1, 0]  # layer 0, token 1, head 0
    half = stories.config.head_dim // 2
    pairs = jnp.stack([key[:half], key[half:]], axis=1).reshape(-1)
    np.testing.assert_allclose(pairs[:4], reference["k_layer0_tok1_head0_first4"], atol=1e-6)


@needs_data
def test_greedy_tokens_equal_the_reference(stories, reference):
    """Each token of the reference is the most likely one after those before it: one pass checks all 64."""
    ids = reference["greedy_ids"]
    chosen = forward(stories, jnp.asarray([ids]))[0].argmax(-1)
    prompt = len(ids) - 64
    np.testing.assert_array_equal(chosen[prompt - 1 : -1], ids[prompt:])


@needs_data
def test_tokenizer_reproduces_ids_and_text(stories, reference):
    tokenizer = stories.tokenizer
    assert tokenizer(reference["text"])["input_ids"] == reference["ids"]
    assert tokenizer.decode(reference["greedy_ids"], skip_special_tokens=True) == reference["greedy_text"]
    text = "Two  spaces, a naïve café, 漢字 and\na line break"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@needs_data
def test_tokenizer_equals_llama2c_greedy_encoding(stories):
    """llama2.c joins the pair with the best score until none is left; ours must give the same ids on prose."""
    pieces, scores = llama2c._pieces(TOKENIZER, 512)
    ids = {piece: i for i, piece in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        tokens = []
        for character in ("▁" + text).replace(" ", "▁"):
            raw = [3 + byte for byte in character.encode()]
            tokens += [ids[character]] if character in ids else raw
        while True:
            pairs = [(pieces[a] + pieces[b], i) for i, (a, b) in enumerate(itertools.pairwise(tokens))]
            known = [(scores[ids[piece]], -i) for piece, i in pairs if piece in ids]
            if not known:
                return [1, *tokens]
            at = -max(known)[1]
            tokens[at : at + 2] = [ids[pieces[tokens[at]] + pieces[tokens[at + 1]]]]

    lines = (DATA / "c4-sample.txt").read_text(encoding="utf-8").splitlines()
    for line in [line[:200] for line in lines if line][:40]:
        assert stories.tokenizer(line)["input_ids"] == encode(line), line


@needs_data
def test_script(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "convert_llama2c.py", MODEL, TOKENIZER, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out").config.head_dim == 8
    command[2] = tmp_path / "nothing.bin"
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "nothing.bin" in failed.stderr


def test_script_refuses_a_file_as_folder(load_script, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("convert_llama2c").main(["model.bin", "tok.bin", "--out", __file__])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors == f"error: `out={__file__}`: {__file__} is a file; name a directory.\n"


def test_pairs_to_halves_by_hand():
    rows = np.arange(8.0)[:, None]  # two heads of four channels: 0 1 2 3 and 4 5 6 7
    assert llama2c.pairs_to_halves(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"short", "too few"),
        (struct.pack("<7i", 0x616B3432, 1, 0, 0, 0, 0, 0), "later version"),
        (struct.pack("<7i", 8, 8, 1, 3, 2, 4, 4), "must divide"),
        (struct.pack("<7i", 8, 8, 1, 2, 2, 4, 4), "ends within model.embed_tokens.weight"),
    ],
)
def test_damaged_checkpoints_end_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        llama2c.read_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_tokenizer_ends_in_one_line(tmp_path):
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(struct.pack("<ifi", 3, 0.0, 3) + b"abc")
    with pytest.raises(ValueError, match=r"no llama2.c tokenizer of 512 pieces"):
        llama2c.read_tokenizer(path, 512)
