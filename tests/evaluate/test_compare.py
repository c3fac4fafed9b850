"""Comparisons: resumed ones equal uninterrupted ones, and nothing of other settings gets into a table."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from kvjax.evaluate import compare as module
from kvjax.evaluate.compare import Task, compare, default_presets, family
from kvjax.evaluate.compare_report import (
    columns,
    cost_of,
    passkey_columns,
    remarks,
    rows,
    to_csv,
    to_markdown,
    to_table,
)
from kvjax.evaluate.journal import Journal
from kvjax.evaluate.memory import cache_shape
from kvjax.evaluate.passkey import passkey
from kvjax.evaluate.perplexity import perplexity
from kvjax.model.llama import LoadedModel
from kvjax.policy import bind, preset

SHAPE = "3x2x64"


class Characters:
    """A tokenizer of one token per character, for a vocabulary of 64."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(c) % 64 for c in text]}

    def decode(self, tokens):
        return "".join(chr(48 + t % 10) for t in tokens)


@pytest.fixture(scope="module", autouse=True)
def tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "tokenizer", Characters())
        yield


@pytest.fixture(scope="module")
def task(model, windows):
    # Prompts of passkey and of protocol decode are alike in shape: nothing compiles twice for one preset.
    decode = np.tile(windows[:2], (1, 2))[:, :135]
    return Task(model, {"all": windows[:3], "decode": decode}, prefill=128, lengths=(128,), depths=2, trials=1, batch=2)


def policy_of(name):
    return bind(name, preset(name), 2)


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """A run without interruption: its folder and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, compare(task, ["int3"], policy_of, Journal(folder / "results.jsonl"), progress=False)


def without_time(records):
    return {
        unit: {k: v for k, v in record.items() if k not in ("seconds", "finished")}
        | {"result": {k: v for k, v in record["result"].items() if k != "seconds"}}
        for unit, record in records.items()
    }


def fake_measure(monkeypatch, calls, stop_after=None):
    def measure(task, policy, part, on_progress):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append((policy.name, part))
        return {"bits_per_element": 1.0, "cells": []}, ["path"]

    monkeypatch.setattr(module, "_measure", measure)


def test_a_killed_run_goes_on(task, whole, tmp_path, monkeypatch):
    """The first three results are there and half of the fourth: the others are measured, and all are equal."""
    folder, uninterrupted = whole
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    path = tmp_path / "results.jsonl"
    path.write_text("".join(lines[:3]) + lines[3][:100])
    fresh = dataclasses.replace(task)  # its reference is not there yet
    real, calls = module._measure, []
    monkeypatch.setattr(module, "_measure", lambda *args: calls.append(args[2]) or real(*args))
    outcome = compare(fresh, ["int3"], policy_of, Journal(path), progress=False)
    assert calls == ["all", "decode", "passkey 128"] and outcome.skipped == 3
    assert without_time(outcome.records) == without_time(uninterrupted.records)
    assert without_time(Journal(path).records) == without_time(Journal(folder / "results.jsonl").records)


def test_results_are_those_of_the_functions(task, whole, model):
    table = rows(task, ["int3"], whole[1], cache_shape(SHAPE), SHAPE, 1024)
    assert [row["quant"] for row in table] == ["bf16", "int3"]
    for protocol in ("all", "decode"):
        direct = perplexity(
            model, [policy_of("int3")], task.windows[protocol], protocol=protocol, batch=2, progress=False,
            prefill=128 if protocol == "decode" else None,
        )  # fmt: skip
        for row, result in zip(table, direct):
            for key in ("nll", "perplexity", "kl", "top1_agreement", "tokens"):
                assert row[f"{protocol}_{key}"] == pytest.approx(getattr(result, key), rel=1e-6, abs=1e-9)
            assert row["bits_per_element"] == result.bits_per_element
            assert row[f"{protocol}_vs_bf16"] == pytest.approx(result.perplexity / direct[0].perplexity - 1, abs=1e-6)
    policies = [policy_of("bf16"), policy_of("int3")]
    recalled = passkey(model, policies, lengths=[128], depths=2, trials=1, progress=False)
    for row in table:
        mine = [r for r in recalled if r.quant == row["quant"]]
        assert row["passkey"] == [
            {"length": 128, "depth": r.depth, "trials": 1, "correct": r.correct, "recall": r.recall} for r in mine
        ]
        assert row["passkey_recall"] == sum(r.recall for r in mine) / 2


def test_forms_agree(task, whole):
    table = rows(task, ["int3"], whole[1], cache_shape(SHAPE), SHAPE, 1024)
    assert json.loads(json.dumps(table)) == table and len({tuple(row) for row in table}) == 1
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    for row, line in zip(table, read, strict=True):
        for key, value in row.items():
            if key != "passkey":
                assert line[key] == ("" if value is None else str(value))
        for cell in row["passkey"]:
            assert float(line[f"passkey_128_{cell['depth']:g}"]) == cell["recall"]
    shown = columns(table)
    assert "read" not in shown and "error" not in shown
    assert shown["KL (decode)"] == [f"{row['decode_kl']:.5f}" for row in table]
    assert shown["GiB"] == [f"{row['shape_bytes'] / 2**30:.2f}" for row in table]
    assert shown["passkey 128"][0] == f"{sum(c['correct'] for c in table[0]['passkey'])}/2"
    assert set(passkey_columns(table)) == {"quant", "length", "25.0%", "75.0%"}
    lines = to_markdown(shown).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert to_table(shown).row_count == 2
    table[1]["bits_read"] = 2.5
    assert columns(table)["read"] == ["", "2.500"]


def test_other_settings_are_not_mixed_in(task, whole, tmp_path, monkeypatch, windows):
    (tmp_path / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    for changed, again in (
        ({"windows": task.windows | {"all": windows[:2]}}, {"all"}),
        ({"prefill": 10}, {"decode"}),
        ({"trials": 2}, {"passkey 128"}),
        ({"seed": 1}, {"passkey 128"}),
        ({"batch": 1}, set()),
    ):
        calls = []
        fake_measure(monkeypatch, calls)
        journal = Journal(tmp_path / "results.jsonl")
        monkeypatch.setattr(journal, "append", lambda record: None)
        outcome = compare(dataclasses.replace(task, **changed), ["int3"], policy_of, journal, progress=False)
        assert {part for _, part in calls} == again and len(calls) == 2 * len(again), changed
        assert outcome.others == 2 * len(again) and outcome.skipped == 6 - len(calls)


def test_methods_are_known_by_what_they_do(task, tmp_path, monkeypatch):
    """The same name with other codecs or constants is measured again; fitted ones on a text by the text's name."""
    calls = []
    fake_measure(monkeypatch, calls)
    only = dataclasses.replace(task, lengths=(), windows={"all": task.windows["all"]})
    journal = Journal(tmp_path / "results.jsonl")

    def run(policy_of, **settings):
        calls.clear()
        compare(only, ["kvquant3"], policy_of, journal, progress=False, **settings)
        return [name for name, _ in calls]

    constants = {"levels": np.ones((2, 8), np.float32)}
    assert run(lambda name: bind(name, preset(name), 2, constants)) == ["bf16", "kvquant3"]
    assert run(lambda name: bind(name, preset(name), 2, constants)) == []
    assert run(lambda name: bind(name, preset(name), 2, {"levels": 2 * constants["levels"]})) == ["kvquant3"]
    assert run(lambda name: bind(name, preset("int4"), 2)) == ["bf16", "kvquant3"]
    fitted = []
    fit = lambda name: fitted.append(name) or bind(name, preset(name), 2)  # noqa: E731
    assert "kvquant3" in run(fit, calibration="a") and fitted == ["bf16", "kvquant3"]
    assert run(fit, calibration="a") == [] and fitted[2:] == ["bf16"]  # not fitted to find that nothing is left
    assert run(fit, calibration="b") == ["kvquant3"]


def test_an_interrupt_keeps_what_is_finished(task, tmp_path, monkeypatch):
    calls = []
    fake_measure(monkeypatch, calls, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        compare(task, ["int3"], policy_of, Journal(tmp_path / "r.jsonl"), progress=False)
    assert [(r["quant"], r["part"]) for r in Journal(tmp_path / "r.jsonl").records.values()] == calls


def test_a_failing_preset_is_a_row(task, tmp_path, monkeypatch):
    def refusing(name):
        if name == "int3":
            raise ValueError("no\nlayers")
        return policy_of(name)

    calls, lines = [], []
    fake_measure(monkeypatch, calls)
    only = dataclasses.replace(task, windows={})
    outcome = compare(
        only, ["int3", "int4"], refusing, Journal(tmp_path / "r.jsonl"), progress=False, on_start=lines.append
    )
    assert outcome.errors == {"int3": "no layers"} and lines == ["2 of 2 results to measure; 0 are finished"]
    assert calls == [("bf16", "passkey 128"), ("int4", "passkey 128")]
    table = rows(only, ["int3", "int4"], outcome, cache_shape(SHAPE), SHAPE, 1024)
    assert [row["error"] for row in table] == [None, "no layers", None]
    assert columns(table)["error"] == ["", "failed, see below", ""] and "int3 failed: no layers" in remarks(table)


def test_what_cannot_be_fitted_is_tried_once(task, tmp_path, monkeypatch):
    tried = []

    def refusing(name):
        tried.append(name)
        if name == "kvquant3":
            raise OSError("no text")
        return policy_of(name)

    fake_measure(monkeypatch, [])
    outcome = compare(task, ["kvquant3"], refusing, Journal(tmp_path / "r.jsonl"), calibration="a", progress=False)
    assert tried == ["bf16", "kvquant3"] and outcome.errors == {"kvquant3": "no text"} and len(outcome.records) == 3


def test_numbers_that_are_none_are_errors(task, tmp_path, monkeypatch):
    nan = dataclasses.replace(task.evaluations["all"].run([policy_of("bf16")], progress=False)[0], kl=float("nan"))
    monkeypatch.setattr(module.Evaluation, "run", lambda *args, **kwargs: [nan])
    only = dataclasses.replace(task, lengths=(), windows={"all": task.windows["all"]})
    outcome = compare(only, [], policy_of, Journal(tmp_path / "r.jsonl"), progress=False)
    assert "KL nan" in outcome.errors["bf16"] and not outcome.records


def test_presets_and_families():
    names = default_presets()
    assert names[:3] == ["bf16", "f16", "f32"] and "kvquant2-dense" in names
    assert not any("qnorm" in name for name in names)
    families = {"kvquant2-dense": "kvquant", "nf4": "nf", "f16": "uncompressed", "kvquant4:nf4": "pair"}
    families |= {"configs/own.toml": "own", "int4:configs/own.toml": "pair", "alignedkv": "alignedkv"}
    assert {name: family(name) for name in families} == families
    assert "is not a preset" in cost_of("kvqant3", cache_shape(SHAPE), 1024)


def test_nothing_to_measure(model, tmp_path):
    with pytest.raises(ValueError, match="nothing to measure"):
        compare(Task(model, {}), ["int3"], policy_of, Journal(tmp_path / "r.jsonl"), progress=False)
