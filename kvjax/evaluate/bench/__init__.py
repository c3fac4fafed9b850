"""What `scripts/bench_decode.py` measures: attention over packed storage, decode steps, large contexts."""
