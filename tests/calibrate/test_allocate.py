"""Spending a budget: exact on problems that add up, within the budget on a model, kept in files."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvjax
from kvjax import decode
from kvjax.calibrate import allocate as allocation
from kvjax.calibrate import allocation_file
from kvjax.calibrate.allocate import allocate, allocated, refine, sensitivities
from kvjax.calibrate.allocation_file import as_preset, load, save, to_toml
from kvjax.calibrate.preset import calibrate
from kvjax.calibrate.spend import spend, steps
from kvjax.evaluate.perplexity import perplexity
from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import bind, preset

CONFIG = ModelConfig(
    layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=32, vocab=64, initializer_range=0.3
)
TEXT = {"samples": 2, "length": 64, "progress": False}


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, make_rope(32, 512), seed=0)


@pytest.fixture(scope="module")
def found(model):
    return allocate(model, "asymkv-auto-2/1@2.5", preset("asymkv-auto-2/1@2.5"), rounds=2, **TEXT)


def additive(seed: int, matrices: int = 4, options: int = 3):
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.choice([1.25, 1.5, 2.0, 2.25, 2.5, 3.0, 4.25], options, replace=False))
    return np.sort(rng.exponential(size=(matrices, options)))[:, ::-1], np.tile(cost, (matrices, 1))


def total(loss, choice):
    return loss[np.arange(len(choice)), choice].sum()


def brute_force(loss, cost, budget):
    every = itertools.product(range(loss.shape[1]), repeat=len(loss))
    fits = [np.array(c) for c in every if total(cost, np.array(c)) <= budget * len(loss) + 1e-9]
    return min(total(loss, c) for c in fits)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_spending_is_as_good_as_brute_force(seed, share):
    loss, cost = additive(seed)
    budget = cost.min() + share * (cost.max() - cost.min())
    choice = spend(loss, cost, budget)
    assert total(cost, choice) <= budget * 4 + 1e-9
    assert total(loss, choice) == pytest.approx(brute_force(loss, cost, budget), abs=1e-12)
    # What is left over buys no step to a better option.
    spare = budget * 4 - total(cost, choice) - 1e-9
    own = np.arange(4), choice
    dearer = (loss < loss[own][:, None]) & (cost - cost[own][:, None] <= spare)
    assert not dearer.any()


def test_more_budget_is_never_worse():
    loss, cost = additive(1, matrices=12, options=4)
    losses = [total(loss, spend(loss, cost, b)) for b in np.linspace(cost.min(), cost.max(), 40)]
    assert (np.diff(losses) <= 1e-12).all() and losses[0] > losses[-1]
    assert (spend(loss, cost, cost.max()) == loss.argmin(1)).all()
    with pytest.raises(ValueError, match="below the least possible, "):
        spend(loss, cost, cost.min() - 0.01)


def test_options_that_no_cheaper_one_equals_are_neighbours():
    loss, cost = np.array([[5.0, 6.0, 3.0, 2.0, 1.0]]), np.array([[1.0, 2.0, 2.5, 3.0, 4.0]])
    assert steps(loss, cost, np.array([2])).tolist() == [[True, False, True, True, False]]
    assert steps(loss, cost, np.array([0])).tolist() == [[True, False, True, False, False]]
    assert steps(loss, cost, np.array([1])).tolist() == [[True, True, True, False, False]]  # its own is kept


def test_refinement_finds_what_does_not_add_up():
    """Two matrices that are harmless alone and ruinous together: the sum of sensitivities takes both down."""
    cost = np.tile([1.0, 2.0], (6, 1))

    def measure(choice):
        low = choice == 0
        return 1.0 * low[0] + 1.0 * low[1] + 9.0 * (low[0] & low[1]) + 1.5 * low[2:].sum()

    loss = sensitivities(measure, 6, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(loss[:, 0], [1, 1, 1.5, 1.5, 1.5, 1.5])
    start = spend(loss, cost, 1.5)
    assert measure(start) == 12.5
    choice, kl, measured = refine(measure, loss, cost, start, 1.5, rounds=4)
    assert kl == measure(choice) == 4.0 and total(cost, choice) <= 9.0 and measured < 2**6
    assert refine(measure, loss, cost, start, 1.5, rounds=0)[1:] == (12.5, 1)


def test_an_allocation_meets_its_budget(model, found):
    assert found.bits_per_element == 2.5 and len(found.keys) == len(found.values) == 2
    assert sorted(found.keys + found.values) == ["kivi1"] * 2 + ["kivi2"] * 2
    chosen = as_preset(found)
    policy = bind("auto", chosen, 2)
    assert decode.bits_per_element(decode.init_cache(model, policy, batch=1, capacity=128)) == 2.5
    tokens, _ = allocation.self_sampled_tokens(model, 2, 64, progress=False)
    row = perplexity(model, [policy], tokens, progress=False)[1]
    assert row.kl == pytest.approx(found.kl, rel=1e-4)


def test_files(model, found, tmp_path):
    chosen = preset(found.name)
    path = tmp_path / "a.json"
    save(path, found)
    assert load(path, model, found.name, chosen) == found
    toml = tmp_path / "a.toml"
    toml.write_text(to_toml(found, chosen))
    assert preset(str(toml)).codecs(2) == as_preset(found).codecs(2)
    assert (preset(str(toml)).k_window, preset(str(toml)).v_window) == (128, 129)

    good = json.loads(path.read_text())
    swapped = {"keys": good["keys"], "values": ["kivi2", "kivi2"]}
    for change, message in (
        ({"model": "0" * 64}, "`model` is '0000"),
        ({"budget": 2.25}, "`budget` is 2.25 but must be 2.5"),
        ({"options": ["kivi1", "kivi4"]}, "`options` is"),
        ({"keys": ["kivi3", "kivi1"]}, "must name one of the options"),
        ({"layers": 3}, "`layers` is 3 but must be 2"),
        ({"k_sensitivity": [[1.0]]}, "2 lists of 2 numbers"),
        ({"v_sensitivity": [[1.0, None]] * 2}, "no finite numbers"),
        ({"keys": "kivi1"}, "`keys` is 'kivi1', not list"),
        ({"format": 9}, "`format` is 9"),
        (swapped if swapped["values"] != good["values"] else {"keys": ["kivi2"] * 2}, "the options named spend"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message) as error:
            load(path, model, found.name, chosen)
        assert "\n" not in str(error.value) and "scripts/allocate.py auto" in str(error.value)
    del good["kl"]
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="`kl` is missing"):
        load(path, model, found.name, chosen)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged or no JSON"):
        load(path, model, found.name, chosen)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none", model, found.name, chosen)


def test_a_policy_is_measured_once_and_kept(model, found, tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    made = []

    def once(*args, **settings):
        made.append(args)
        return found

    monkeypatch.setattr(allocation, "allocate", once)
    first, again = (kvjax.policy(found.name, model, progress=False) for _ in range(2))
    assert len(made) == 1 and len(list(tmp_path.rglob("asymkv-auto-2-1@2.5.json"))) == 1
    assert [s.k_codec for s in first.segments] == [s.k_codec for s in again.segments]
    assert first.name == found.name and (first.k_window, first.v_window) == (128, 129)
    (file,) = tmp_path.rglob("*.json")
    given = kvjax.policy(found.name, model, calibration=file)
    assert [s.v_codec for s in given.segments] == [s.v_codec for s in first.segments]
    # A TOML file that asks for a budget has a file of its own for every budget.
    toml = tmp_path / "mine.toml"
    toml.write_text(f'quant = "{found.name}"\nk_window = 64\n')
    assert kvjax.policy(str(toml), model).k_window == 64 and len(made) == 2
    assert len(list(tmp_path.rglob("mine-*.json"))) == 1


def test_budgets_and_settings_that_cannot_be(model):
    for name, message in (
        ("asymkv-auto-2/1@1.5", "a budget of 1.5 .* cannot be met; for this model's shape it goes from 2 to 3"),
        ("asymkv-auto-2/1@3.5", "cannot be used up"),
        ("asymkv-auto@1.5", "from 1.625 to 5"),  # heads of 32 channels make values' groups smaller
    ):
        with pytest.raises(ValueError, match=message):
            allocated(model, name, preset(name), text="unread.txt")
    chosen = preset("asymkv-auto@2.5")
    for settings in ({"samples": 0}, {"length": 1}, {"rounds": -1}):
        with pytest.raises(ValueError, match="|".join(f"`{key}={value}`" for key, value in settings.items())):
            allocate(model, "asymkv-auto@2.5", chosen, **settings)
    with pytest.raises(ValueError, match="no budget to spend"):
        allocate(model, "kivi2", preset("kivi2"))
    with pytest.raises(ValueError, match="bits to be allocated, not constants"):
        calibrate(model, "asymkv-auto@2.5", chosen)


def test_options():
    assert preset("asymkv-auto-2/1@2.5").options == ("kivi1", "kivi2")
    assert preset("asymkv-auto-4/2@3-g64-eta").options == ("kivi2-g64-eta", "kivi4-g64-eta")
    assert preset("asymkv-auto@2-g64").options == tuple(
        f"kivi{form}" for form in ("1-g64-twomean", "1-g64", "2-g64-eta", "2-g64", "4-g64")
    )
    assert preset("asymkv-auto-4/2@3-m8").options == ("kivi2-m8", "kivi4-m8")
    free = preset("asymkv-auto@2")
    assert {(c.bits, c.group) for c in (preset(o).keys for o in free.options)} == set(
        itertools.product((1, 2, 4), (32, 128))
    )
    assert all(c.group == 32 for c in (preset(o).keys for o in preset("asymkv-auto@2-w32").options))  # fits the window
    assert dataclasses.replace(free, budget=None, options=()) == preset(free.options[0])
    assert allocation_file.file_name("asymkv-auto-2/1@2.5", free) == "asymkv-auto-2-1@2.5.json"


def test_the_model_that_ships_has_allocations(monkeypatch):
    monkeypatch.setattr(allocation, "allocate", None)
    tiny = kvjax.load("tiny")
    for name in ("asymkv-auto@2", "asymkv-auto@2.5", "asymkv-auto@3"):
        policy = kvjax.policy(name, tiny)
        cache = decode.init_cache(tiny, policy, batch=2, capacity=300)
        budget = float(name.rpartition("@")[2])
        assert budget - 0.1 < decode.bits_per_element(cache) <= budget
    _, cache = decode.prefill(tiny, cache, np.arange(400).reshape(2, 200) % 97, [200, 150])
    logits, cache = decode.step(tiny, cache, np.array([5, 6]))
    assert np.isfinite(logits).all() and cache.length.tolist() == [201, 151]
