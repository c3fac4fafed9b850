"""The tables against the numbers of the NormalFloat baseline in KVQuant (arXiv 2401.18079)."""

import numpy as np
import pytest

from kvjax.codecs.tables import nf_levels, uniform_levels

NF = {
    4: "-1 -.6962 -.5251 -.3949 -.2844 -.1848 -.0910 0 .0796 .1609 .2461 .3379 .4407 .5626 .7230 1",
    3: "-1 -.4786 -.2171 0 .1609 .3379 .5626 1",
    2: "-1 0 .3379 1",
    1: "-1 1",
}


@pytest.mark.parametrize("bits", NF)
def test_nf_levels_are_the_published_ones(bits):
    np.testing.assert_allclose(nf_levels(bits), np.array(NF[bits].split(), float), atol=5e-5)


def test_uniform_levels():
    np.testing.assert_allclose(uniform_levels(2), [-1, -1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("levels", [nf_levels, uniform_levels])
@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_are_sorted_and_span_the_range(levels, bits):
    table = levels(bits)
    assert table.shape == (2**bits,)
    assert (np.diff(table) > 0).all() and table[0] == -1 and table[-1] == 1


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        nf_levels(bits)
