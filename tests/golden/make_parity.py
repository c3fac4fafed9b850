"""Makes parity.npz: logits of transformers' models for every variant in tests/model/variants.py.

    python tests/golden/make_parity.py            (needs torch; run from the repository's root)

Weights and prompts come from numpy seeds, so only tokens and logits are stored. The versions and the seed of the
stored run are in parity.npz under "source". Run it again when a variant is added; a run that changes an existing entry
by more than rounding says why in its commit.
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "model")]

import variants  # noqa: E402


def main():
    import torch
    import transformers

    torch.set_num_threads(1)
    arrays = {
        "source": np.array(
            f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}, "
            f"float32 on CPU, seed {variants.SEED}"
        )
    }
    for variant in variants.VARIANTS:
        for name, value in variants.run_torch(variant).items():
            arrays[f"{variant.name}.{name}"] = value
        print(variant.name)
    np.savez_compressed(variants.GOLDEN, **arrays)
    print(f"{variants.GOLDEN}: {variants.GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
