"""plot_training.py: a picture of a small log, and errors in one line."""

import json

import pytest

STEP = {"tokens": 1024, "loss": 2.0, "losses": {"prose": 2.0}, "phase": "short"}


@pytest.fixture
def draw(load_script, tmp_path):
    """Draws a run whose log has these lines, and a replay of as many; returns the picture's path."""

    def run(lines, *options):
        (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        out = tmp_path / "loss.png"
        load_script("plot_training").main(["--run", str(tmp_path), "--out", str(out), *options])
        return out

    return run


def test_a_log_and_its_longer_replay(draw, tmp_path):
    pytest.importorskip("matplotlib")
    replay = tmp_path / "torch.jsonl"
    replay.write_text(f"{json.dumps({'loss': 2.0})}\n" * 4, encoding="utf-8")
    steps = [json.dumps(STEP | {"tokens": 1024 * i}) for i in (1, 2, 3)]
    assert draw(steps, "--torch", str(replay), "--smooth", "2").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], (), "has no steps yet"),
        (['{"loss": 1}'], (), "wants tokens, loss, losses, phase in every line's JSON"),
        (["3"], (), "is no log of training"),
        (["loss 3"], (), "is no log of training"),
        ([json.dumps(STEP)], ("--run", "/none"), "`run=/none`: /none/log.jsonl cannot be read"),
        ([json.dumps(STEP)], ("--torch", "/none.jsonl"), "`torch=/none.jsonl`"),
        ([json.dumps(STEP)], ("--smooth", "0"), "`smooth=0` must be at least 1"),
        ([json.dumps(STEP)], ("--out", "/none/loss.png"), "`out=/none/loss.png`: its directory does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(draw, tmp_path, capsys, lines, options, message):
    with pytest.raises(SystemExit) as stop:
        draw(lines, *options)
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "loss.png").exists()
