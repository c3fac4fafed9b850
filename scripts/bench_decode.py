"""Times a decode step at several contexts, as a ratio to the bf16 cache in the same run.

python scripts/bench_decode.py --model tiny --quant kvquant4,kvquant3 --contexts 1024,8192
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _cli import one_line_errors, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvjax
from kvjax.decode import init_cache, prefill, step
from kvjax.policy import preset


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help='"tiny", a directory in Hugging Face layout, or a hub id')
    parser.add_argument("--quant", default="kvquant4,kvquant3,kvquant2", help="presets, commas between (%(default)s)")
    parser.add_argument("--contexts", default="1024,8192", help="tokens in the cache, commas between (%(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="steps timed per preset (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    with one_line_errors():
        contexts = [int(c) for c in args.contexts.split(",")]
        rows = run(args, ["bf16", *(q for q in args.quant.split(",") if q != "bf16")], contexts)
        if args.json:
            report = {"rows": rows, "platform": jax.default_backend(), "versions": versions()}
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(rows)
    return 0


def run(args: argparse.Namespace, quants: list[str], contexts: list[int]) -> list[dict[str, Any]]:
    for quant in quants:
        preset(quant)
    model = kvjax.load(args.model)
    policies = {quant: kvjax.policy(quant, model) for quant in quants}
    rng = np.random.default_rng(0)
    rows = []
    for context in contexts:
        # Random tokens: what the K/V are does not matter to the time, that they are not zeros does.
        tokens = rng.integers(0, model.config.vocab, (args.batch, context))
        caches = {}
        for quant in quants:
            cache = init_cache(model, policies[quant], batch=args.batch, capacity=context + args.rounds + 8)
            _, caches[quant] = prefill(model, cache, tokens)
        seconds: dict[str, list[float]] = {quant: [] for quant in quants}
        token = tokens[:, -1]
        for i in track(range(args.rounds + 3), f"decoding at {context} tokens", console=Console(stderr=True)):
            for quant in quants:  # in turn, so that a busy machine slows all alike
                start = time.perf_counter()
                logits, caches[quant] = step(model, caches[quant], token)
                logits.block_until_ready()
                if i >= 3:
                    seconds[quant].append(time.perf_counter() - start)
        base = np.median(seconds["bf16"])
        for quant in quants:
            median = float(np.median(seconds[quant]))
            rows.append({"quant": quant, "context": context, "batch": args.batch, "ms_per_step": 1e3 * median})
            rows[-1]["time_over_bf16"] = median / base
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("context", "preset", "ms per step", "time / bf16", box=None)
    for row in rows:
        table.add_row(str(row["context"]), row["quant"], f"{row['ms_per_step']:.2f}", f"{row['time_over_bf16']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
