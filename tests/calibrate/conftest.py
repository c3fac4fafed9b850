"""One small model for the tests that calibrate whole presets: what it compiles is shared."""

import pytest

from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random


@pytest.fixture(scope="session")
def small():
    config = ModelConfig(
        layers=2, width=16, mlp_width=16, q_heads=2, kv_heads=1, head_dim=8, vocab=40, max_positions=64, bos_id=3,
        eos_ids=tuple(range(20)), initializer_range=0.3,
    )  # fmt: skip
    return init_random(config, make_rope(8, 64), seed=0)
