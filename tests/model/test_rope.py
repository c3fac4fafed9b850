"""Rotary embedding: the rotation itself, and frequencies as transformers computes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.model.rope import cos_sin, make_rope, rope_from_config, rotate

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {**YARN, "original_max_position_embeddings": 64},
    {**YARN, "original_max_position_embeddings": 4096, "attention_factor": 0.9},
    {**YARN, "truncate": False},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "factor": None, "original_max_position_embeddings": 64},
    {**LLAMA3, "original_max_position_embeddings": 128},
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
]


def test_rotate_by_hand():
    """Channels (0, 2) and (1, 3) are pairs; the first turns by a quarter, the second by none."""
    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    turned = rotate(x, jnp.asarray([[0.0, 1.0]]), jnp.asarray([[1.0, 0.0]]))
    assert turned.tolist() == [[-3.0, 2.0, 1.0, 4.0]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_scores_depend_on_distance_alone(dtype):
    q, k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 64)), dtype)
    rope = make_rope(64, 2048)

    def score(m, n):
        turned = (rotate(x, *cos_sin(rope, jnp.asarray([p]))) for x, p in ((q, m), (k, n)))
        assert all(x.dtype == dtype for x in turned)
        turned = (rotate(x.astype(jnp.float32), *cos_sin(rope, jnp.asarray([p]))) for x, p in ((q, m), (k, n)))
        return float(jnp.vdot(*turned))

    assert score(1005, 1000) == pytest.approx(score(5, 0), abs=1e-3)
    assert score(5, 0) != pytest.approx(score(6, 0), abs=1e-2)


@pytest.mark.parametrize("parameters", KINDS, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_frequencies_equal_transformers(parameters):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for head_dim in (64, 80, 96, 128, 256):
        for theta in (10000.0, 500000.0):
            config = LlamaConfig(head_dim=head_dim, max_position_embeddings=256)
            config.rope_parameters = {**parameters, "rope_theta": theta}
            rope = rope_from_config(config)
            theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
            np.testing.assert_allclose(rope.inv_freq, theirs.numpy(), rtol=3e-6)  # theirs is float32 throughout
            assert rope.attention_factor == pytest.approx(factor)
            if rope.dynamic is None:
                continue
            for length in (10, 256, 257, 3000):
                theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(length))
                cos, _ = cos_sin(rope, jnp.asarray([1]), jnp.asarray([length]))
                np.testing.assert_allclose(cos[0], np.cos(theirs.numpy()), atol=1e-6)


def test_dynamic_frequencies_follow_each_rows_length():
    rope = make_rope(64, 16, rope_type="dynamic", factor=2.0)
    positions = jnp.asarray([[3, 9], [3, 9], [3, 9]])
    cos, sin = cos_sin(rope, positions, jnp.asarray([[10], [16], [40]]))
    assert cos.shape == sin.shape == (3, 2, 32)
    np.testing.assert_array_equal(cos[0], cos[1])  # up to max_position the length does not matter
    assert np.abs(cos[1] - cos[2]).max() > 0.01
    scalar, _ = cos_sin(rope, positions, 40)
    np.testing.assert_array_equal(scalar[2], cos[2])
    with pytest.raises(ValueError, match="lengths"):
        cos_sin(rope, positions)


def test_long_positions_stay_accurate():
    """The float32 product is the only rounding: cos and sin of large angles are exact to a float32 unit."""
    rope = make_rope(128, 2**24, rope_theta=500000.0)
    positions = np.asarray([1_000_003, 10_000_019])
    cos, _ = cos_sin(rope, jnp.asarray(positions))
    angles = (positions[:, None].astype(np.float32) * rope.inv_freq).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-7)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope'.*default, linear, dynamic, yarn, llama3"),
        ({"type": "su"}, "rope_type='su'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "linear"}, "factor=None"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor=None"),
    ],
)
def test_unsupported_parameters_end_in_one_line(parameters, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        make_rope(64, 2048, **parameters)
    assert "\n" not in str(caught.value)


def test_odd_heads_and_partial_rotation_are_refused():
    with pytest.raises(ValueError, match="head_dim=63"):
        make_rope(63, 2048)
    cos, sin = cos_sin(make_rope(32, 2048), jnp.arange(3))
    with pytest.raises(ValueError, match="64 channels but `cos` turns 32"):
        rotate(jnp.zeros((3, 64)), cos, sin)


def test_both_spellings_of_a_config_give_the_same_rope():
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 1024}
    v5 = rope_from_config({**sizes, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    v4 = rope_from_config({**sizes, "rope_theta": 500000, "rope_scaling": {**LLAMA3, "type": "llama3"}})
    np.testing.assert_array_equal(v4.inv_freq, v5.inv_freq)
    assert v4.parameters == v5.parameters
    assert ("original_max_position_embeddings", 1024) in v5.parameters  # as transformers fills it in
    with pytest.raises(ValueError, match="sliding_attention"):
        rope_from_config({**sizes, "rope_parameters": {"full_attention": {}, "sliding_attention": {}}})
