"""Times loss and gradients of the tiny model: the training loss against the plain forward pass.

    PYTHONPATH=. python tests/train/bench_loss.py [--windows 128 512] [--tokens 8192]

CPU seconds are what to compare on a machine that others use too. Tokens are random, weights untrained: neither
changes the work.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.model.forward import forward
from kvjax.train import loss, recipe, step

TINY = Path(__file__).parents[2] / "configs" / "train_tiny.toml"


def training(model, tokens):
    weights = jnp.full(
        (tokens.shape[0], tokens.shape[1] - 1), 1 / (tokens.shape[0] * (tokens.shape[1] - 1)), jnp.float32
    )
    return loss.token_losses(model, tokens, weights)[0]


def plain(model, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(forward(model, tokens[:, :-1]), tokens[:, 1:]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=8192, help="per step")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    plan = recipe.load(TINY)
    model = step.initial_model(plan)
    for window in args.windows:
        shape = (args.tokens // window, window + 1)
        tokens = np.random.default_rng(0).integers(2, plan.model.vocab, shape).astype(np.int32)
        for function, dtype in ((training, "float32"), (training, "bfloat16"), (plain, "float32")):

            def of_state(state, function=function, dtype=dtype, tokens=tokens):
                return function(model.with_state({name: x.astype(dtype) for name, x in state.items()}), tokens)

            run = jax.jit(jax.value_and_grad(of_state)).lower(model.state).compile()
            jax.block_until_ready(run(model.state))
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                jax.block_until_ready(run(model.state))
            wall, cpu = (time.perf_counter() - wall) / args.steps, (time.process_time() - cpu) / args.steps
            memory = run.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"windows of {window:4d} {function.__name__:8s} {dtype:8s}: {cpu:6.2f} CPU s per step, "
                f"{args.tokens / wall:6.0f} tokens/s, {memory:5.0f} MiB of temporaries",
                flush=True,
            )


if __name__ == "__main__":
    main()
