"""The shares that the noise filter keeps, and the theta that it suggests."""

import numpy as np
import pytest
from noise_cases import LABELLED, OFF_DIAGONAL, narrow

from flipkd_dist.filter_shares import FilterShares, filter_shares, suggested_threshold


def test_filter_shares_are_those_of_equation_3():
    assert filter_shares(*LABELLED, OFF_DIAGONAL, 0.5) == FilterShares(0.75, 0.5, 0.8)
    assert filter_shares(*LABELLED, OFF_DIAGONAL, 0.75) == FilterShares(0.5, 0.25, 0.4)  # negatives: below 0.25
    assert filter_shares(*LABELLED, OFF_DIAGONAL, None) == FilterShares(1.0, 1.0, 1.0)


def test_filter_shares_of_absent_kinds():
    shares = filter_shares(np.array([0.7]), np.array([1]), np.array([]), 0.5)
    assert shares == FilterShares(1.0, None, None) and shares.smallest == 1.0
    assert filter_shares(np.array([]), np.array([]), np.array([]), 0.5) == FilterShares(None, None, None)


def test_the_suggestion_is_the_strictest_that_keeps_half():
    case = narrow(0.55, 0.95)
    theta = suggested_threshold(*case)
    assert filter_shares(*case, theta).smallest >= 0.5 > filter_shares(*case, theta + 0.05).smallest


@pytest.mark.parametrize("low, high, expected", [(0.92, 0.97, 0.05), (0.97, 0.999, None)])
def test_the_suggestion_where_no_theta_keeps_half(low, high, expected):
    assert suggested_threshold(*narrow(low, high)) == expected
