"""Time to trace and compile a decode step at the shape of a real model, from abstract weights: nothing is allocated.

python scripts/bench_compile.py --quant bf16,kvquant3,kivi2,asymkv-16-0,configs/mask-32.toml
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from _cli import Parser, check_targets, count, environment, one_line_errors, presets, show
from rich.table import Table

from kvjax import decode
from kvjax.evaluate.bench.headline import MODELS, abstract_model
from kvjax.evaluate.memory import abstract_cache
from kvjax.model import cached
from kvjax.policy import preset


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", default="bf16,kvquant3,kivi2,asymkv-16-0,asymkv-20-8,configs/mask-32.toml")
    parser.add_argument("--model", default="llama-3-8b", choices=list(MODELS), help="the shape (%(default)s)")
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens of capacity (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_targets(args, "json")
        rows = [measure(name, args) for name in presets(args.quant)]
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = Table(box=None, pad_edge=False)
    for column in ("quant", "segments", "trace s", "compile s", "together s", "temporaries MiB", "cache donated"):
        table.add_column(column, justify="left" if column == "quant" else "right")
    for row in rows:
        table.add_row(
            row["quant"], str(row["segments"]), f"{row['trace_s']:.2f}", f"{row['compile_s']:.2f}",
            f"{row['trace_s'] + row['compile_s']:.2f}", f"{row['temporary_bytes'] / 2**20:.0f}",
            f"{row['aliased']:.0%}",
        )  # fmt: skip
    show([table, f"{args.model}, {args.context:,} tokens, {count(args.batch, 'row')}, {args.dtype}", environment()])
    return 0


def measure(name: str, args: argparse.Namespace) -> dict:
    """One preset's decode step, compiled for the default backend."""
    config = MODELS[args.model]
    model = abstract_model(config, args.context, args.dtype)
    shape = decode.CacheShape(config.layers, config.q_heads, config.kv_heads, config.head_dim, model.rope)
    cache = abstract_cache(name, preset(name), shape, args.context, jnp.dtype(args.dtype), batch=args.batch)
    token = jax.ShapeDtypeStruct((args.batch,), jnp.int32)
    start = time.perf_counter()
    lowered = cached.step.lower(model, cache, token, token)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of ours has it
    return {
        "quant": name,
        "segments": len(cache.segments),
        "trace_s": traced - start,
        "compile_s": end - traced,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes / decode.nbytes(cache),
    }


if __name__ == "__main__":
    sys.exit(main())
