"""Trains a small Llama from text files; see docs/training.md.

python scripts/train_tiny.py --config configs/train_tiny.toml --corpus books.txt.xz --out runs/tiny --minutes 10
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from _cli import Parser, check_folder, one_line_errors

TINY = Path(__file__).resolve().parents[1] / "configs" / "train_tiny.toml"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=TINY, help="recipe in TOML; by default configs/train_tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry of the recipe")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="texts: .txt, .txt.xz or .txt.gz")
    parser.add_argument("--held-out", type=Path, help="text for the report; without it the end of the corpus is kept")
    parser.add_argument("--tokenizer", default="tiny", help="tiny (shipped), train (a new one), or a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: log, checkpoints, model, report")
    parser.add_argument("--minutes", type=float, help="scale the recipe to take about this long here")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--devices", type=int, help="how many devices to use; all by default")
    parser.add_argument(
        "--recall",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on recall, copies and repetitions, and measure recall; without: prose only",
    )
    parser.add_argument("--recall-lengths", type=int, nargs="+", default=[256, 512, 1024], metavar="TOKENS")
    parser.add_argument("--recall-trials", type=int, default=50, metavar="PROMPTS")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check_folder(args, "out")
    for name in ("minutes", "checkpoint_every", "devices", "recall_trials"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"`--{name.replace('_', '-')} {value}` must be positive.")

    import jax

    from kvjax.train import data, loop, recipe

    chosen = recipe.load(args.config, args.set)
    if not args.recall:
        phases = tuple(dataclasses.replace(phase, mix={"prose": 1.0}) for phase in chosen.phases)
        chosen = dataclasses.replace(chosen, phases=phases)
    devices = jax.devices()
    if args.devices and args.devices > len(devices):
        raise ValueError(f"`--devices {args.devices}`: there are {len(devices)}; give fewer.")
    corpus = data.prepare(args.corpus, chosen.model.vocab, args.tokenizer, args.held_out, args.out / "cache")
    options = loop.Options(
        resume=args.resume,
        minutes=args.minutes,
        checkpoint_every=args.checkpoint_every,
        devices=devices[: args.devices],
        recall_lengths=tuple(args.recall_lengths) if args.recall else (),
        recall_trials=args.recall_trials,
    )
    try:
        print(json.dumps(loop.train(chosen, corpus, args.out, options)))
    except loop.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    with one_line_errors():
        main()
