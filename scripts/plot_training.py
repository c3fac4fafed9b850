"""Draws the losses of a training run by task; see docs/training.md.

python scripts/plot_training.py --run runs/tiny --out loss.png [--torch torch.jsonl]
"""

import json
from pathlib import Path

from _cli import Parser, one_line_errors


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of scripts/train_tiny.py")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--torch", type=Path, help="losses of tests/train/replay_torch.py on the same batches")
    parser.add_argument("--smooth", type=int, default=8, help="steps averaged per point of a task's curve")
    args = parser.parse_args(argv)

    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install 'kvjax[plots]'.") from None

    entries = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    figure, (whole, tasks) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, sharey=True)
    tokens = [entry["tokens"] / 1e6 for entry in entries]
    whole.plot(tokens, [entry["loss"] for entry in entries], lw=0.8, label="kvjax")
    if args.torch:
        replayed = [json.loads(line) for line in args.torch.read_text().splitlines()]
        whole.plot(tokens[: len(replayed)], [e["loss"] for e in replayed], "k:", lw=0.8, label="torch, same batches")
    whole.set(xlabel="million tokens", ylabel="nats per token", title="loss of each batch")
    for name in ("prose", "recall", "copied", "repeated"):
        having = [entry for entry in entries if name in entry["losses"]]
        groups = [having[i : i + args.smooth] for i in range(0, len(having), args.smooth)]
        tasks.plot(
            [group[-1]["tokens"] / 1e6 for group in groups],
            [sum(entry["losses"][name] for entry in group) / len(group) for group in groups],
            lw=1,
            label=name,
        )
    tasks.set(xlabel="million tokens", title=f"by task, mean of {args.smooth} steps")
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
    figure.savefig(args.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
