"""Whole runs of ten steps: resumed equals uninterrupted, and what goes wrong is said in one line."""

import dataclasses
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.train import data, display, loop

ROOT = Path(__file__).parents[2]
ONE = loop.Options(checkpoint_every=3, recall_lengths=(128,), recall_trials=4)


def options(**changes) -> loop.Options:
    return dataclasses.replace(ONE, devices=jax.devices()[:1], **changes)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    entries = log(folder)
    assert [e["step"] for e in entries] == list(range(10))
    return [e["loss"] for e in entries]


@pytest.fixture(scope="module")
def whole(small_recipe, small_corpus, tmp_path_factory):
    """An uninterrupted run: its folder and report."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, loop.train(small_recipe, small_corpus, folder, options())


def interrupt_at(monkeypatch, step, action):
    write = display.Log.write

    def interrupted(self, entry):
        write(self, entry)
        if entry["step"] == step:
            action()

    monkeypatch.setattr(display.Log, "write", interrupted)


class Crash(Exception):
    pass


def crash():
    raise Crash


def test_a_run_leaves_log_model_and_report(whole, small_recipe):
    folder, found = whole
    entries = log(folder)
    assert losses(folder)[-1] < losses(folder)[0]
    assert [e["phase"] for e in entries] == ["first"] * 5 + ["second"] * 5
    assert [e["learning_rate"] for e in entries] == pytest.approx([small_recipe.learning_rate(s) for s in range(10)])
    for entry in entries:
        assert entry["tokens"] == (entry["step"] + 1) * 256
        assert set(entry["losses"]) <= {"prose", "recall", "copied", "repeated"}
    assert found == json.loads((folder / "report.json").read_text())
    assert set(found["recall"]) == {"128"} and 0 < found["bits_per_byte"] < 8 and found["tokens"] == 2560


def test_the_exported_model_is_the_trained_one(whole, small_corpus):
    folder, _ = whole
    model = kvjax.load(folder / "model")
    assert model.config.eos_ids == (1,) and model.config.initializer_range == 0.02
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    text = "The captain held the wind."
    assert model.tokenizer(text).input_ids == small_corpus.tokenizer.encode(text).ids


def test_transformers_reads_the_exported_model(whole):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvjax.model.forward import forward

    folder, _ = whole
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = np.array([AutoTokenizer.from_pretrained(folder / "model")("the old ship went under").input_ids])
    logits = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(forward(kvjax.load(folder / "model"), tokens), logits, atol=1e-4)


def test_a_crashed_run_goes_on_exactly(monkeypatch, whole, small_recipe, small_corpus, tmp_path):
    """It dies after step 7 with a checkpoint at 6: step 7 is done again, and nothing differs."""
    with monkeypatch.context() as patch, pytest.raises(Crash):
        interrupt_at(patch, 7, crash)
        loop.train(small_recipe, small_corpus, tmp_path, options())
    assert len(log(tmp_path)) == 8
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.')  # a line cut short
    resumed = loop.train(small_recipe, small_corpus, tmp_path, options(resume=True))
    assert losses(tmp_path) == losses(whole[0])  # bit for bit
    for key in ("bits_per_byte", "recall"):
        assert resumed[key] == whole[1][key]
    weights = (folder / "model" / "model.safetensors" for folder in (tmp_path, whole[0]))
    assert len({w.read_bytes() for w in weights}) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_finishes_the_step_and_saves_it(monkeypatch, whole, small_recipe, small_corpus, tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted, match="after step 5 of 10"):
        interrupt_at(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        loop.train(small_recipe, small_corpus, tmp_path, options(checkpoint_every=100))
    assert signal.getsignal(signal.SIGINT) is usual
    loop.train(small_recipe, small_corpus, tmp_path, options(resume=True, checkpoint_every=100))
    assert losses(tmp_path) == losses(whole[0])


def test_a_finished_run_resumed_reports_again(whole, small_recipe, small_corpus):
    folder, found = whole
    before = losses(folder)
    again = loop.train(small_recipe, small_corpus, folder, options(resume=True))
    assert losses(folder) == before and again["bits_per_byte"] == found["bits_per_byte"]


def test_minutes_scale_the_recipe_once(monkeypatch, small_recipe, small_corpus, tmp_path):
    factors = []
    scaled = type(small_recipe).scaled
    monkeypatch.setattr(type(small_recipe), "scaled", lambda self, factor: factors.append(factor) or scaled(self, 0.4))
    loop.train(small_recipe, small_corpus, tmp_path, options(minutes=1.0))
    assert len(factors) == 1 and factors[0] > 1  # ten of these steps take far less than a minute
    assert len(log(tmp_path)) == 4
    monkeypatch.setattr(loop, "_fit", lambda *_: pytest.fail("a resumed run keeps its length"))
    loop.train(small_recipe, small_corpus, tmp_path, options(minutes=1.0, resume=True))


def test_runs_that_cannot_begin_say_why(whole, small_recipe, small_corpus, tmp_path):
    folder, _ = whole
    other = dataclasses.replace(small_recipe, seed=1)
    text = dataclasses.replace(small_corpus, train=small_corpus.train[:-1])
    short = dataclasses.replace(small_corpus, train=small_corpus.train[:64])
    three = dataclasses.replace(ONE, devices=jax.devices()[:3])
    cases = [
        (small_recipe, small_corpus, folder, options(), "holds a run already"),
        (small_recipe, small_corpus, tmp_path, options(resume=True), "no run to resume"),
        (other, small_corpus, folder, options(resume=True), "recipe.seed=0, and now it is 1"),
        (small_recipe, text, folder, options(resume=True), "begun with corpus="),
        (small_recipe, short, tmp_path, options(), "has 64 tokens"),
        (small_recipe, small_corpus, tmp_path, options(minutes=1e-9), "less than compiling"),
    ]
    if len(jax.devices()) >= 3:
        cases.append((small_recipe, small_corpus, tmp_path, three, "cannot share evenly"))
    for recipe, corpus, out, chosen, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            loop.train(recipe, corpus, out, chosen)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--corpus", "absent.txt"], "absent.txt"),
        (["--corpus", "latin.txt"], "not UTF-8"),
        (["--corpus", "short.txt"], "need more than 1024"),
        (["--corpus", "short.txt", "--set", "optimizer.momentum=1"], "Unknown key `optimizer.momentum`"),
        (["--corpus", "short.txt", "--config", "absent.toml"], "absent.toml"),
        (["--corpus", "short.txt", "--tokenizer", "absent.json"], "absent.json"),
        (["--corpus", "short.txt", "--set", "model.vocab=5000"], "4096 pieces"),
        (["--corpus", "short.txt", "--minutes", "-1"], "must be positive"),
        (["--corpus", "short.txt", "--out", "short.txt/run"], "short.txt is a file; name a directory"),
        (["--corpus", "short.txt", "--devices", "10000"], "give fewer"),
    ],
)
def test_script_ends_in_one_line_and_code_2(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Ishmaël".encode("latin-1"))
    Path("short.txt").write_text("Call me Ishmael.")
    config = [] if "--config" in arguments else ["--config", str(ROOT / "configs" / "train_tiny.toml")]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *config, "--out", "run", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "train_tiny.py"), run_name="__main__")
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_script_trains(monkeypatch, capsys, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text)
    small = {"layers": 1, "width": 16, "mlp_width": 16, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "vocab": 300}
    settings = [f"model.{key}={value}" for key, value in small.items()]
    settings += ["tokens_per_step=1024", *(f"phases.{i}.tokens=1024" for i in range(4))]
    settings += [f"phases.{i}.windows=[{window}]" for i, window in enumerate((64, 64, 64, 128))]
    arguments = [word for setting in settings for word in ("--set", setting)]
    config = ["--config", str(ROOT / "configs" / "train_tiny.toml"), "--tokenizer", "train", "--no-recall"]
    monkeypatch.setattr(
        sys, "argv", ["train_tiny.py", *config, "--corpus", "book.txt", "--out", "run", "--devices", "1", *arguments]
    )
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    runpy.run_path(str(ROOT / "scripts" / "train_tiny.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 4 and found["recall"] == {}
    assert [entry["window"] for entry in log(tmp_path / "run")] == [64, 64, 64, 128]
    assert all(set(entry["losses"]) == {"prose"} for entry in log(tmp_path / "run"))
    assert data.load_tokenizer("run/model/tokenizer.json").get_vocab_size() == 300
