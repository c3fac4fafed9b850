"""Trains transformers' Llama with torch on the very batches of a finished run, from the same weights.

    PYTHONPATH=. python tests/train/replay_torch.py --run runs/tiny --corpus books.txt.xz --out torch.jsonl

The losses must be those in the run's log, step for step, up to what rounding grows into. `test_step.py` holds six
steps to that; this does it for a whole run, for `docs/training.md`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from kvjax.model.weights import save
from kvjax.train import data, loop, recipe, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of scripts/train_tiny.py")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="as the run was given")
    parser.add_argument("--held-out", type=Path, help="as the run was given")
    parser.add_argument("--tokenizer", default="tiny", help="as the run was given")
    parser.add_argument("--out", type=Path, required=True, help="losses, one JSON object per step")
    args = parser.parse_args()

    plan = recipe.from_table(json.loads((args.run / "run.json").read_text())["trained_recipe"])
    corpus = data.prepare(args.corpus, plan.model.vocab, args.tokenizer, args.held_out, args.run / "cache")
    with tempfile.TemporaryDirectory() as folder:
        save(step.initial_model(plan), folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = plan.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    passages = data.Passages(corpus.train, plan.seed)
    begun = time.monotonic()
    with args.out.open("w") as log:
        for index in range(plan.steps):
            batch = loop._draw(plan, corpus, passages, index)
            tokens, weights = torch.tensor(batch.tokens).long(), torch.tensor(batch.weights)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(index)
            losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits.mT, tokens[:, 1:], reduction="none")
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            entry = {"step": index, "loss": loss.item(), "seconds": round(time.monotonic() - begun, 3)}
            log.write(json.dumps(entry) + "\n")
            log.flush()


if __name__ == "__main__":
    main()
