"""A small random model whose predictions are not flat, and text for it."""

import numpy as np
import pytest

from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random

CONFIG = ModelConfig(
    layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=32, vocab=64, initializer_range=0.3
)


@pytest.fixture(scope="session")
def model():
    return init_random(CONFIG, make_rope(32, 512), seed=0)


@pytest.fixture(scope="session")
def windows():
    return np.random.default_rng(0).integers(0, 64, (5, 80)).astype(np.int32)
