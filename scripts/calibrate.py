"""Fits a preset's tables and ranges for a model and writes them to a file that kvjax.policy reads.

python scripts/calibrate.py --model tiny --quant kvquant3 --text wikitext2-valid.txt --out kvquant3.safetensors
"""

import argparse
import sys
import time

from _cli import Parser, one_line_errors, seed
from rich.console import Console
from rich.table import Table

from kvjax.calibrate import artefact
from kvjax.calibrate import preset as calibration
from kvjax.model import weights
from kvjax.policy import preset as named_preset


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help='"tiny", a directory in Hugging Face layout, or a hub id')
    parser.add_argument("--quant", required=True, help="preset, e.g. kvquant3")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; without it the model writes its own")
    parser.add_argument("--samples", type=int, default=calibration.SAMPLES, metavar="N", help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, metavar="S", help="tokens of each (2048, or the model's context)")
    parser.add_argument("--seed", type=seed, default=0, help="of the windows or the sampled text (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    args = parser.parse_args(argv)
    with one_line_errors():
        artefact.check_target(args.out)
        preset = named_preset(args.quant)
        model = weights.load(args.model)
        start = time.perf_counter()
        result = calibration.calibrate(
            model,
            args.quant,
            preset,
            text=args.text,
            samples=args.samples,
            length=args.length,
            seed=args.seed,
            batch=args.batch,
        )
        calibration.save(args.out, result)
        seconds = time.perf_counter() - start
    print_report(result, args.out, seconds)
    return 0


def print_report(result: calibration.Calibration, path: str, seconds: float) -> None:
    table = Table("layer", "tensor", "in slots", "no slot left", "error / uniform's", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result.report():
        shares = (f"{row['outliers']:.3%}", f"{row['dropped']:.3%}", f"{row['error_vs_uniform']:.3f}")
        table.add_row(str(row["layer"]), row["tensor"], *shares)
    Console(highlight=False).print(table)
    meta = result.meta
    print(f"{meta.preset} fitted on {meta.tokens} tokens ({meta.source}) in {seconds:.1f} s: {path}")


if __name__ == "__main__":
    sys.exit(main())
