"""Writes a copy of a model with the outlier channels of a large one: the same logits, keys that are harder to store.

python scripts/make_outliers.py --model tiny --out runs/tiny-outliers --text wikitext2-valid.txt
"""

import argparse
import dataclasses
import functools
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from _cli import Parser, one_line_errors, seed
from rich.console import Console
from rich.table import Table

from kvjax.evaluate.text import tokenize, windows
from kvjax.model import weights
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.forward import forward
from kvjax.model.llama import LoadedModel
from kvjax.model.outliers import LLAMA2_7B, OUTLIER, Measured, OutlierProfile, profile_of, rewrite

# What stands beside the weights and goes with any of them.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
              "generation_config.json")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with one_line_errors():
        out = check_out(args.out)
        profile = OutlierProfile(
            key_fraction=args.key_fraction,
            key_factors=tuple(args.key_factor),
            value_fraction=args.value_fraction,
            value_factors=tuple(args.value_factor),
            seed=args.seed,
        )
        model = weights.load(args.model)
        tokens = read_tokens(args, model)
        written = write(model, rewrite(model, profile), out)
        difference = float(np.abs(np.asarray(forward(model, tokens) - forward(written, tokens))).max())
        before, after = profile_of(model, tokens), profile_of(written, tokens)
    Console(highlight=False).print(table(before, after))
    print(f"{out}: {profile}")
    print(f"largest difference of any logit, {tokens.shape[0]} x {tokens.shape[1]} tokens of "
          f"{Path(args.text).name if args.text else 'random ids'}: {difference:.3g}")  # fmt: skip
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = dataclasses.asdict(LLAMA2_7B)
    parser.add_argument("--model", required=True, help='"tiny", a directory in Hugging Face layout, or a hub id')
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="made if missing; must not hold a model")
    for what, unit in (("key", "RoPE pairs"), ("value", "channels")):
        parser.add_argument(f"--{what}-factor", type=float, nargs="+", metavar="F", default=default[f"{what}_factors"],
                            help="powers of two to draw from (%(default)s)")  # fmt: skip
        parser.add_argument(f"--{what}-fraction", type=float, metavar="P", default=default[f"{what}_fraction"],
                            help=f"share of a head's {unit} (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=seed, default=default["seed"], help="of channels and factors (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="measure on this UTF-8 text (random tokens)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="to measure on (%(default)s)")
    return parser.parse_args(argv)


def check_out(path: str) -> Path:
    """The directory to write to; a model that is in it already is not overwritten."""
    out = Path(path).expanduser()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"`out={path}` is a file; name a directory.")
    for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.gguf"):
        if found := next(out.glob(pattern), None):
            raise FileExistsError(f"`out={path}` has a model in it ({found.name}); name another directory.")
    return out


def read_tokens(args: argparse.Namespace, model: LoadedModel) -> np.ndarray:
    """`[1, N]` tokens: the text's first, or random ones."""
    if not 2 <= args.tokens <= model.config.max_positions:
        raise ValueError(
            f"`tokens={args.tokens}` must lie between 2 and the model's {model.config.max_positions} positions."
        )
    if args.text:
        return windows(tokenize(model, args.text), args.tokens, 1)
    return np.random.default_rng(args.seed).integers(0, model.config.vocab, (1, args.tokens), np.int32)


def write(model: LoadedModel, rewritten: LoadedModel, out: Path) -> LoadedModel:
    """Saves in the dtype of the original's file, which powers of two do not round, and loads what was saved."""
    source = Path(str(model.path))
    with Checkpoint(source) as checkpoint:
        stored = functools.reduce(jnp.promote_types, set(checkpoint.dtypes.values()))
    weights.save(rewritten, out, stored)
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, out / file.name)
    return weights.load(str(out), model.dtype)


def table(before: Measured, after: Measured) -> Table:
    shown = Table("layer", "largest / median key channel", f"key channels > {OUTLIER:g}", "value channel", box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    for layer in range(len(before.keys)):
        shown.add_row(
            str(layer),
            f"{before.keys[layer]:.1f} -> {after.keys[layer]:.1f}",
            f"{before.key_outliers[layer]:.1%} -> {after.key_outliers[layer]:.1%}",
            f"{before.values[layer]:.1f} -> {after.values[layer]:.1f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
