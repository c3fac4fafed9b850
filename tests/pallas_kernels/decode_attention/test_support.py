"""The support matrix: the kernels' own word, and the README's."""

from pathlib import Path

import jax
import pytest

from pallas_kernels.decode_attention import api, specs, support


def test_the_cpu_runs_everything_and_reasons_are_words():
    assert all(support.why_not(storage, "CPU") is None for storage in specs.STORAGES)
    for column in support.CHIPS:
        for storage in specs.STORAGES:
            reason = support.why_not(storage, column)
            assert reason is None or len(reason.split()) > 4


def test_a_shape_that_no_kernel_takes_is_refused_with_its_number():
    odd = specs.Shape(layers=1, batch=1, blocks=2, heads=2, group=2, channels=80)
    assert "80" in support.why_not("kivi4", "TPU v5e", odd)


@pytest.mark.parametrize(("implementation", "chip"), [("mosaic_tpu", "TPU v4"), ("mosaic_gpu", "sm_80")])
def test_other_chips_are_refused_by_name(implementation, chip):
    k, v = (specs.abstract(kind, support.SHAPE) for kind in ("affine4-tokens32", "affine4-channels32"))
    with pytest.raises(NotImplementedError, match=chip):
        api.check(k, v, 4, implementation, chip, False)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU column needs JAX 0.11")
def test_the_readme_shows_the_matrix_as_it_is():
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- support -->\n")[1].split("\n<!-- /support -->")[0]
    assert shown == support.markdown(), "run scripts/kernel_budget.py --support and put what it prints there"
