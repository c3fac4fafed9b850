"""Converts a llama2.c checkpoint and its tokenizer to the Hugging Face layout, for kvjax and transformers.

python scripts/convert_llama2c.py stories260K.bin tok512.bin --out runs/stories260K
"""

import argparse
import sys

from _cli import Parser, check_folder, one_line_errors

from kvjax.model.llama2c import convert


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="llama2.c model, legacy format (version 0)")
    parser.add_argument("tokenizer", help="its llama2.c tokenizer.bin")
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="made if missing")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_folder(args, "out")
        print(convert(args.checkpoint, args.tokenizer, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
