"""Writes text with a compressed K/V cache and says what the cache really cost.

python scripts/generate.py --quant kvquant3
python scripts/generate.py --mesh seq=4                     # over 4 devices
python scripts/generate.py --mesh seq=16 --distributed      # on every host of a TPU pod, or under Slurm
python scripts/generate.py --mesh seq=16 --distributed --coordinator HOST:8476 --processes 2 --process 0    # and 1

A long document is read once, and asked about often:

python scripts/generate.py --prompt-file moby-dick.txt --save-cache moby
python scripts/generate.py --load-cache moby --prompt "The whale is called"
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import IO, Any

import _mesh
import jax
import numpy as np
from _cli import Parser, check_targets, one_line_errors, seed, versions
from _saved import Saved, saved_rows
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax.decode import bits_per_element, bits_read, explain, generate, init_cache, nbytes, statistics
from kvjax.distributed import Run
from kvjax.evaluate.text import read_file
from kvjax.policy import preset

PROMPT = "The captain looked out over the sea, and for a long time he did not speak."


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help='"tiny", a directory in Hugging Face layout, or a hub id')
    parser.add_argument("--quant", help="preset (kvquant3; with --load-cache, what is saved)")
    parser.add_argument("--calibration", metavar="FILE", help="made by scripts/calibrate.py (found or made without)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="text to continue (one is built in)")
    given.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest, 0 for all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--context", type=int, metavar="N", help="capacity in tokens (prompt and new tokens)")
    parser.add_argument("--save-cache", metavar="DIR", help="save the cache there once it holds the prompt")
    parser.add_argument("--load-cache", metavar="DIR", help="continue what is saved there with the prompt")
    parser.add_argument("--strict", action="store_true", help="fail where attention would run without a kernel")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    _mesh.add_arguments(parser)
    args = parser.parse_args(argv)
    with one_line_errors(), _mesh.join(args) as joined:
        report = run(args, Console(stderr=True, highlight=False, quiet=not joined.main), joined)
        if args.json and joined.main:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def run(args: argparse.Namespace, console: Console, joined: Run) -> dict[str, Any]:
    if joined.main:
        check_targets(args, "json")
    saved = Saved(args)
    prompt = PROMPT if args.prompt is None else args.prompt
    if args.prompt_file is not None:
        prompt = read_file(args.prompt_file, "prompt-file")
    if not args.load_cache:
        preset(args.quant)  # a misspelt preset is told before the model is loaded
    mesh = _mesh.make(args, joined, prompt)
    with console.status("loading the model"):
        model = kvjax.load(args.model, mesh=mesh)
        saved.check(model)
        ids = np.asarray(saved.tokenize(model.tokenizer, prompt), np.int32)[None]
    if not ids.size:
        raise ValueError("`prompt` is empty; give at least one token to continue.")
    wanted = saved.length + ids.shape[1] + args.max_new_tokens
    capacity = wanted if args.context is None else args.context
    if wanted > capacity:
        before = f"{args.load_cache} holds {saved.length} tokens, " if saved.length else ""
        raise ValueError(
            f"{before}`prompt` has {ids.shape[1]} tokens and --max-new-tokens {args.max_new_tokens} more are wanted, "
            f"but --context is {capacity}; pass --context {wanted} or shorten the prompt."
        )
    policy = saved.policy(model)
    _mesh.check_same(joined, model, policy)

    def new_cache() -> kvjax.KVCache:
        return init_cache(model, policy, batch=1, capacity=capacity, mesh=mesh, **saved.form)

    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    path = explain(new_cache(), strict=args.strict)
    start = time.perf_counter()
    never = (-1,) * len(model.config.eos_ids)  # as many as there are: their number is part of what is compiled
    with console.status("compiling"):
        generate(model, new_cache(), ids, max_new_tokens=min(2, args.max_new_tokens), eos=never, **sampling)
    compiled = time.perf_counter()
    cache = saved.load(model, policy, capacity, mesh=mesh) or new_cache()
    stream = Stream(model.tokenizer, prompt, sys.stdout if joined.main else None)
    hooks: dict[str, Any] = {"on_token": stream.take, "on_prefill": saved.keeper(model, ids)}
    begin = time.perf_counter()
    with saved:
        _, cache = generate(model, cache, ids, max_new_tokens=args.max_new_tokens, **hooks, **sampling)
    stream.finish()
    seconds = np.diff([begin + saved.waited, *stream.times])
    bf16 = kvjax.policy("bf16", model)
    uncompressed = jax.eval_shape(lambda: init_cache(model, bf16, batch=1, capacity=capacity, mesh=mesh))
    report = (
        {
            "text": stream.text,
            "quant": args.quant,
            "bits_per_element": bits_per_element(cache),
            "bits_read_per_element": (bits_read(cache) or {}).get("all"),
            "cache_bytes": nbytes(cache),
            "bf16_bytes": nbytes(uncompressed),
            "prefill_tokens_per_s": ids.shape[1] / seconds[0],
            "decode_tokens_per_s": len(seconds[1:]) / seconds[1:].sum() if len(seconds) > 1 else None,
            "path": path,
            "platform": f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
            "versions": versions(),
        }
        | _mesh.report(args, cache)
        | saved.report
    )
    show(report, console, cache, compiled - start, ids.shape[1], len(stream.tokens))
    return report


class Stream:
    """Prints text to `out` (None: nowhere) as its tokens arrive; holds back what may be a part of a character."""

    def __init__(self, tokenizer: Any, prompt: str, out: IO[str] | None):
        self.tokenizer, self.out = tokenizer, out
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self._write(prompt)

    def take(self, tokens: np.ndarray) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(int(tokens[0]))
        self._print(hold="\ufffd")

    def finish(self) -> None:
        self._print(hold="")
        self._write("\n")

    def _print(self, hold: str) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if hold and text.endswith(hold):
            return
        self._write(text[len(self.text) :])
        self.text = text

    def _write(self, text: str) -> None:
        if self.out is not None:
            print(text, end="", flush=True, file=self.out)


def show(report: dict, console: Console, cache: kvjax.KVCache, compile_s: float, prompt: int, new: int) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "preset": f"{report['quant']}: {report['bits_per_element']:.2f} bits per element, as stored",
        "read": read_in_part(cache),
        "path": report["path"],
        "cache": f"{report['cache_bytes']:,} bytes for {cache.capacity:,} tokens, sinks and recent tokens included "
        f"(bf16: {report['bf16_bytes']:,})",
        "mesh": mesh_row(report),
        "outliers": f"{statistics(cache)['dropped_outliers']} found no slot",
        "prefill": f"{prompt} tokens, {report['prefill_tokens_per_s']:.0f} tokens/s",
        "decode": f"{new} tokens" + (f", {s:.0f} tokens/s" if (s := report["decode_tokens_per_s"]) else ""),
        **saved_rows(report),
        "compiled": f"in {compile_s:.1f} s on {report['platform']}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print()
    console.print(table)


def mesh_row(report: dict) -> str:
    """How the cache is spread; empty without a mesh."""
    if "mesh" not in report:
        return ""
    processes = f" of {report['processes']} processes" if report["processes"] > 1 else ""
    return f"{report['mesh']}: {report['devices']} devices{processes}, {report['cache_bytes_per_device']:,} bytes each"


def read_in_part(cache: kvjax.KVCache) -> str:
    """What decode steps read of the bits that are stored."""
    if all(segment.reads is None for segment in cache.segments):
        return "all of them"
    read = bits_read(cache)
    if read is None:
        return "nothing yet: no block was full"
    return (
        f"{read['all']:.2f} of them a step (keys {read['keys']:.2f}, values {read['values']:.2f}; in units of "
        f"64 bytes {read['all_units']:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
