"""Rotary embedding: the rotation itself, and frequencies as transformers computes them."""

import math

import jax
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


def frequencies64(kind, head_dim, theta, factor=1.0, low=1.0, high=4.0, original=8192):
    """The papers' equations in float64, a channel pair at a time, with default betas of YaRN."""
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        if kind == "linear":
            f /= factor
        elif kind == "llama3":
            turned = original * f / (2 * math.pi)
            kept = min(max((turned - low) / (high - low), 0.0), 1.0)
            f = (1 - kept) * f / factor + kept * f
        elif kind == "yarn":
            first, last = (
                head_dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in (32, 1)
            )
            ramp = min(max((i - math.floor(first)) / (math.ceil(last) - math.floor(first)), 0.0), 1.0)
            f = f / factor * ramp + f * (1 - ramp)
        yield f


EXACT = {
    "llama": ({}, 128, 1e4),
    "llama-h96": ({}, 96, 5e5),
    "linear": ({"rope_type": "linear", "factor": 3.0}, 64, 1e4),
    "yarn": ({**YARN, "factor": 40.0, "original_max_position_embeddings": 8192}, 128, 1e4),
    "llama3": ({**LLAMA3, "original_max_position_embeddings": 8192}, 128, 5e5),
}
POSITIONS = np.asarray([0, 1, 131071, 2**24 + 1, 10**7, 10**7 - 1, 10**7 - 12345, 1 - 10**7, -1], np.int32)


def angle_error(got, expected):
    """The largest difference of angles modulo 2 pi."""
    difference = np.asarray(got, np.longdouble) - expected
    return float(np.abs(difference - 2 * np.pi * np.rint(difference / (2 * np.pi))).max())


@pytest.mark.parametrize("name", EXACT)
def test_angles_are_exact_at_ten_million_tokens(name):
    parameters, head_dim, theta = EXACT[name]
    rope = make_rope(head_dim, 8192, rope_theta=theta, **parameters)
    facts = {"factor": 1.0, "rope_type": "default"} | parameters
    exact = np.asarray([*frequencies64(facts["rope_type"], head_dim, theta, facts["factor"])])
    np.testing.assert_allclose(rope.inv_freq, exact, rtol=1e-7)
    cos, sin = (np.asarray(x) / rope.attention_factor for x in cos_sin(rope, POSITIONS))
    expected = POSITIONS[:, None].astype(np.float64) * exact
    assert angle_error(np.arctan2(sin, cos), expected) < 5e-7
    np.testing.assert_allclose(np.hypot(cos, sin), 1.0, atol=3e-7)


def test_how_far_float32_is_off():
    """The figures of the module's docstring: why neither float32 products nor float32 frequencies will do."""
    exact = np.asarray([*frequencies64("default", 128, 1e4)])
    rounded = exact.astype(np.float32)
    position = np.arange(10**7 - 20000, 10**7, 7, dtype=np.int64)[:, None]
    formula = position * exact
    assert 0.6 < angle_error(position.astype(np.float32) * rounded, formula) < 0.8
    assert 0.25 < angle_error(position * rounded.astype(np.float64), formula) < 0.3
    trained = np.arange(131072)[:, None]
    assert angle_error(trained * rounded.astype(np.float64), trained * exact) < 4e-3
    assert angle_error(trained.astype(np.float32) * rounded, trained * exact) < 8e-3


def test_rotation_relative_to_a_tile_is_the_absolute_one():
    """(R(p - base) q) . (R(t) k) = (R(p) q) . (R(base + t) k) with p and base near 10^7, and both are right."""
    rng = np.random.default_rng(0)
    rope, tile, base, p = make_rope(128, 8192), np.arange(256), 10**7 - 40000 + 1, 10**7 + 3
    q, k = rng.standard_normal((1, 128)).astype(np.float32), rng.standard_normal((256, 128)).astype(np.float32)

    def scores(of_query, of_keys):
        turned = rotate(jnp.asarray(q), *cos_sin(rope, jnp.asarray([of_query])))
        return rotate(jnp.asarray(k), *cos_sin(rope, jnp.asarray(of_keys))) @ turned[0]

    angle = (p - base - tile)[:, None] * np.asarray([*frequencies64("default", 128, 1e4)])
    a, b = np.split(q[0].astype(np.float64), 2)
    turned = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
    expected = (turned * k).sum(-1)
    np.testing.assert_allclose(scores(p - base, tile), expected, rtol=0, atol=3e-5)
    np.testing.assert_allclose(scores(p, base + tile), expected, rtol=0, atol=3e-5)


def test_leaves_of_a_rope_are_integers_and_positions_must_be():
    rope = make_rope(64, 2048)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(rope)] == 2 * [((32,), np.int32)]
    assert jax.eval_shape(lambda rope: cos_sin(rope, jnp.zeros((3, 5), jnp.int32)), rope)[0].shape == (3, 5, 32)
    with pytest.raises(ValueError, match="`positions` is float32"):
        cos_sin(rope, jnp.zeros(3))


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
