"""Training of small Llamas from a text file: data, tasks, recipe, loop. `scripts/train_tiny.py` drives it."""
