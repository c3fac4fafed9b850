"""Recipes: filled from TOML, checked, and their schedules by hand."""

import dataclasses
from pathlib import Path

import pytest

from kvjax.train import recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("train_*.toml"))
TINY = Path(__file__).parents[2] / "configs" / "train_tiny.toml"


def two_phases(**changes) -> recipe.Recipe:
    """Steps of 100 tokens; ten steps at 1, then five from 0.8 down to 0; warm-up of four steps."""
    first = recipe.Phase("a", 1000, (20, 50), (1.0, 1.0), {"prose": 1.0})
    second = recipe.Phase("b", 500, (25,), (0.8, 0.0), {"recall": 1.0})
    optimizer = recipe.Optimizer(warmup_steps=4)
    return recipe.Recipe((first, second), tokens_per_step=100, optimizer=optimizer, **changes)


def test_schedule_by_hand():
    plan = two_phases()
    assert plan.steps == 15 and plan.phase_steps == (10, 5)
    warm_up = [0.25, 0.5, 0.75, 1.0]
    decay = [0.8, 0.6, 0.4, 0.2, 0.0]
    assert [plan.learning_rate(s) for s in range(15)] == pytest.approx(warm_up + [1.0] * 6 + decay)


def test_steps_take_windows_in_turn():
    plan = two_phases()
    assert [plan.window(s) for s in (0, 1, 2, 9, 10, 14)] == [20, 50, 20, 50, 25, 25]
    assert [plan.locate(s)[0].name for s in (9, 10)] == ["a", "b"]
    with pytest.raises(ValueError, match="15"):
        plan.locate(15)


def test_scaling_keeps_the_shape_of_the_schedule():
    half = two_phases().scaled(0.5)
    assert half.phase_steps == (5, 2) and half.optimizer.warmup_steps == 1
    assert [half.learning_rate(s) for s in (0, 1, 5, 6)] == pytest.approx([1.0, 1.0, 0.8, 0.0])
    assert two_phases().scaled(3).optimizer.warmup_steps == 2  # a twentieth of 45 steps
    assert two_phases().scaled(10).optimizer.warmup_steps == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load_and_survive_a_round_trip(path):
    loaded = recipe.load(path)
    assert recipe.from_table(dataclasses.asdict(loaded)) == loaded
    assert path.read_text().startswith("# python scripts/train_tiny.py")


def test_tiny_is_the_shipped_models_recipe():
    tiny = recipe.load(TINY)
    assert sum(p.tokens for p in tiny.phases) == 26_000_000
    assert [tiny.phases[i].learning_rate[0] for i in (0, 1, 2)] == [3e-3, 3e-3, 2e-3]
    assert tiny.learning_rate(tiny.steps - 1) == 0


def test_settings_change_values_of_every_kind():
    loaded = recipe.load(
        TINY,
        ["optimizer.clip=0.5", "phases.0.tokens=1e6", "phases.1.windows=[64,128]", "compute_dtype=float32"],
    )
    assert loaded.optimizer.clip == 0.5 and loaded.phases[0].tokens == 1_000_000
    assert loaded.phases[1].windows == (64, 128) and loaded.compute_dtype == "float32"


@pytest.mark.parametrize(
    "setting, words",
    [
        ("speed=1", "Unknown key `speed`"),
        ("optimizer.momentum=0.9", "Unknown key `optimizer.momentum`"),
        ("phases.0.mix.hop=0.2", "Unknown key `phases.0.mix.hop`"),
        ("phases.9.tokens=1", "index from 0 to 3"),
        ("phases.0=3", "must be a table"),
        ("model.width=wide", "of type int"),
        ("tokens_per_step=true", "of type int"),
        ("optimizer.clip.x=1", "no keys below"),
        ("optimizer.clip=-1", "clip"),
        ("seed", "no `=`"),
        ("phases.0.windows=[48]", "must divide"),
        ("phases.0.windows=[]", "empty"),
        ("phases.0.mix.prose=0.9", "add up to 1"),
        ("phases.0.facts=[3, 1]", "fewest, most"),
        ("phases.0.learning_rate=1e-3", "a list of 2"),
        ("phases.0.tokens=-5", "positive"),
        ("model.q_heads=3", "multiple of kv_heads"),
        ("compute_dtype=float8", "auto, float32 or bfloat16"),
    ],
)
def test_bad_settings_say_what_is_wrong_in_one_line(setting, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        recipe.load(TINY, [setting])
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("phases = [")
    for path, words in [(bad, "not TOML"), (tmp_path / "absent.toml", "cannot be read")]:
        with pytest.raises(ValueError, match=words):
            recipe.load(path)
    bad.write_text("seed = 1")
    with pytest.raises(ValueError, match="`phases` is missing"):
        recipe.load(bad)
