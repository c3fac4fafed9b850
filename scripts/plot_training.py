"""Draws the losses of a training run by task; see docs/training.md.

python scripts/plot_training.py --run runs/tiny --out loss.png [--torch torch.jsonl]
"""

import json
import sys
from pathlib import Path
from typing import Any

from _cli import Parser, check_targets, one_line_errors

from kvjax.evaluate.report import plotting


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of scripts/train_tiny.py")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--torch", type=Path, help="losses of tests/train/replay_torch.py on the same batches")
    parser.add_argument("--smooth", type=int, default=8, help="steps averaged per point of a task's curve")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.smooth < 1:
            raise ValueError(f"`smooth={args.smooth}` must be at least 1 step.")
        check_targets(args, "out")
        entries = read_log("run", args.run, args.run / "log.jsonl", ("tokens", "loss", "losses", "phase"))
        replayed = read_log("torch", args.torch, args.torch, ("loss",)) if args.torch else []
        draw(plotting(args.out, "out"), entries, replayed, args.smooth, args.out)
    return 0


def read_log(option: str, given: Path, path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The steps of a log, each with `keys`; errors name the option, and the file where it is not what was given."""
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise OSError(f"`{option}={given}`: {path} cannot be read ({error.strerror}); is it of a run?") from None
    except ValueError:  # of JSON, or of UTF-8
        entries = [None]
    if not entries:
        raise ValueError(f"`{option}={given}`: {path} has no steps yet; wait for the first.")
    if not all(isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries):
        raise ValueError(
            f"`{option}={given}`: {path} is no log of training; it wants {', '.join(keys)} in every line's JSON."
        )
    return entries


def draw(plt: Any, entries: list[dict[str, Any]], replayed: list[dict[str, Any]], smooth: int, out: Path) -> None:
    figure, (whole, tasks) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, sharey=True)
    tokens = [entry["tokens"] / 1e6 for entry in entries]
    whole.plot(tokens, [entry["loss"] for entry in entries], lw=0.8, label="kvjax")
    if replayed:
        both = list(zip(tokens, replayed))
        whole.plot(*zip(*((at, e["loss"]) for at, e in both)), "k:", lw=0.8, label="torch, same batches")
    whole.set(xlabel="million tokens", ylabel="nats per token", title="loss of each batch")
    for name in ("prose", "recall", "copied", "repeated"):
        having = [entry for entry in entries if name in entry["losses"]]
        groups = [having[i : i + smooth] for i in range(0, len(having), smooth)]
        tasks.plot(
            [group[-1]["tokens"] / 1e6 for group in groups],
            [sum(entry["losses"][name] for entry in group) / len(group) for group in groups],
            lw=1,
            label=name,
        )
    tasks.set(xlabel="million tokens", title=f"by task, mean of {smooth} steps")
    phase = ""
    for entry, at in zip(entries, tokens):
        if entry["phase"] != phase:
            phase = entry["phase"]
            for axes in (whole, tasks):
                axes.axvline(at, color="0.8", lw=0.8, zorder=0)
            whole.annotate(phase, (at, 1), xycoords=("data", "axes fraction"), fontsize=7, va="top", rotation=90)
    whole.legend(fontsize=8)
    tasks.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
