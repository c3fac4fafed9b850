"""One step: the optimizer against torch's, and the same numbers on one device and on many."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from kvjax.model.weights import save
from kvjax.train import step as steps
from kvjax.train.recipe import Optimizer


def draw(rows=4, length=64, vocab=300, seed=0) -> steps.Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    return steps.Batch(tokens, (rng.random((rows, length)) > 0.2).astype(np.float32), np.arange(rows) % 4)


def run(recipe, devices, batches, rate=1e-2):
    model, mesh = steps.initial_model(recipe), steps.data_mesh(jax.devices()[:devices])
    state, step = steps.initial_state(model, recipe, mesh), steps.make_step(recipe, mesh)
    metrics = []
    for batch in batches:
        state, found = step(state, np.float32(rate), *steps.place(batch, mesh))
        metrics.append(jax.device_get(found))
    return state, metrics, step


def test_losses_and_weights_follow_torch(small_recipe, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from transformers import LlamaForCausalLM

    batches, settings, rate = [draw(seed=s) for s in range(6)], small_recipe.optimizer, 1e-2
    state, metrics, _ = run(small_recipe, 1, batches, rate)

    initial = steps.initial_model(small_recipe)
    theirs = LlamaForCausalLM.from_pretrained(save(initial, tmp_path / "initial"), dtype=torch.float32)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for batch, found in zip(batches, metrics):
        tokens, weights = torch.tensor(batch.tokens).long(), torch.tensor(batch.weights)
        logits = theirs(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.clip)
        optimizer.step()
        np.testing.assert_allclose(found["loss"], loss.item(), rtol=2e-5)
        np.testing.assert_allclose(found["gradient_norm"], norm.item(), rtol=1e-4)
    ours = LlamaForCausalLM.from_pretrained(save(initial.with_state(state.params), tmp_path / "trained"))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        # Adam divides by tiny moments: a rounding error of a gradient near zero moves a weight by up to a step.
        difference = (p - q).abs()
        assert difference.mean() < 1e-5 and difference.max() < rate, name


def test_metrics_per_task_add_up(small_recipe):
    batch = draw()
    _, [found], _ = run(small_recipe, 1, [batch])
    np.testing.assert_allclose(found["task_weight"].sum(), batch.weights.sum())
    np.testing.assert_allclose(found["task_loss"].sum() / batch.weights.sum(), found["loss"], rtol=1e-5)
    by_row = batch.weights.sum(1)
    np.testing.assert_allclose(found["task_weight"], [by_row[batch.tasks == t].sum() for t in range(4)])


def test_only_matrices_decay(small_recipe):
    """Without a gradient the update is the decay alone, and norms have none."""
    optimizer = steps.make_optimizer(Optimizer(decay=0.1))
    params = steps.initial_model(small_recipe).state
    zero = jax.tree.map(np.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    for name, value in params.items():
        wanted = np.zeros_like(value) if name.endswith("norm") else 0.1 * np.asarray(value)
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-6, err_msg=name)


def test_many_devices_do_what_one_does(small_recipe):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    batches = [draw(seed=s) for s in range(4)]
    one, metrics_one, _ = run(small_recipe, 1, batches)
    mesh = steps.data_mesh(jax.devices()[:4])
    four = steps.initial_state(steps.initial_model(small_recipe), small_recipe, mesh)
    arguments = (np.float32(1e-2), *steps.place(batches[0], mesh))
    step = steps.make_step(small_recipe, mesh).lower(four, *arguments).compile()
    metrics_four = []
    for batch in batches:
        four, found = step(four, np.float32(1e-2), *steps.place(batch, mesh))
        metrics_four.append(jax.device_get(found))
    for a, b in zip(metrics_one, metrics_four):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    for name, value in one.params.items():
        difference = np.abs(np.asarray(value) - np.asarray(four.params[name]))
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name

    kinds = r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    # Gradients and sums only: no weight and no batch travels.
    assert set(re.findall(kinds, step.as_text())) == {"all-reduce"}


def test_a_batch_can_be_learnt_by_heart_and_one_shape_compiles_once(small_recipe):
    steps._make_step.cache_clear()
    _, metrics, step = run(small_recipe, 1, [draw()] * 80)
    assert metrics[0]["loss"] == pytest.approx(np.log(300), rel=0.05)
    assert metrics[-1]["loss"] < 1
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "asked, platform, given",
    [("auto", "cpu", "float32"), ("auto", "gpu", "bfloat16"), ("bfloat16", "cpu", "bfloat16")],
)
def test_compute_dtype_per_platform(small_recipe, asked, platform, given):
    recipe = dataclasses.replace(small_recipe, compute_dtype=asked)
    assert steps.compute_dtype(recipe, platform) == given


def test_bfloat16_keeps_float32_weights_and_still_learns(small_recipe):
    recipe = dataclasses.replace(small_recipe, compute_dtype="bfloat16")
    state, metrics, _ = run(recipe, 1, [draw()] * 20)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
