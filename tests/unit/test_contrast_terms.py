"""The contrastive losses that may stand in for L_MCL: against the slow reference, and at their papers' limits."""

import math
from types import SimpleNamespace
from typing import get_args

import loss_reference as reference
import numpy as np
import pytest
import torch
from test_losses import layouts, one_row, random_case, seeds
from torch.autograd import grad, gradcheck
from torch.nn import functional as F

from flipkd_dist.config import LossConfig
from flipkd_dist.contrast_terms import _contrastive, contrast_terms
from flipkd_dist.losses import FORMULAS, SYMBOLS, cosine_matrix, distance_sum

BASELINES = ("infonce", "arccse", "kdmcse")
KINDS = ("mcl", *BASELINES)
baselines, kinds = (pytest.mark.parametrize("kind", names) for names in (BASELINES, KINDS))


def settings(kind, margin=0.0, temperature=1.0, **more):
    return LossConfig(contrastive=kind, margin=0.0 if kind == "infonce" else margin, temperature=temperature, **more)


def opposed_case(*shape):
    """A random case whose nearest negative (cosine 0.9) the teacher sees opposed: 1 - s is above 1."""
    case = random_case(*shape)
    case.teacher[case.student == 0.9] = -0.9
    return case


def rows_of(case, dtype=torch.float64):
    masks = {"anchor": case.anchor, "negative": case.negative, "positive_column": case.column}
    masks = {name: torch.tensor(values) for name, values in masks.items()}
    return SimpleNamespace(teacher_similarity=torch.tensor(case.teacher, dtype=dtype), **masks)


def value(case, loss, dtype=torch.float64):
    """The torch loss of a case, its gradient by the student's cosines, and the counts of the margin."""
    student = torch.tensor(case.student, dtype=dtype, requires_grad=True)
    total, counts = _contrastive(student, rows_of(case, dtype), loss)
    assert total.shape == () and total.dtype == dtype
    return total.item(), grad(total, student)[0].numpy(), counts.tolist()


def expected(kind, case, *numbers):
    masks = case.anchor, case.negative, case.column
    return reference.baseline_sum(kind, case.student, case.teacher, *masks, *numbers)


@seeds
@layouts
@baselines
@pytest.mark.parametrize(("margin", "temperature"), [(0.0, 0.5), (0.1745, 0.05), (0.4, 0.05), (0.9, 1.0)])
def test_baselines(seed, m, n, start, kind, margin, temperature):
    case = opposed_case(seed, m, n, start)
    total, gradient, counts = value(case, settings(kind, margin, temperature))
    want, out_of_range = expected(kind, case, margin, temperature)
    assert want > 0.1 and total == pytest.approx(want, abs=1e-10)
    used = case.anchor[:, None] & case.negative & (np.arange(n) != case.column[:, None])
    assert counts == [sum(out_of_range), case.anchor.sum() + used.sum()]
    assert sum(out_of_range) > 0 or (kind, margin) not in {("arccse", 0.9), ("kdmcse", 0.4)}  # both ends are reached
    used[np.arange(m), case.column] = used.any(axis=1)
    assert not gradient[~used].any()


@kinds
@pytest.mark.parametrize("margin", [0.06, 0.4, 0.9])
def test_gradients(kind, margin):
    case = opposed_case(4, 5, 8, 2)
    loss, rows = settings(kind, margin, 0.5), rows_of(case)
    assert gradcheck(lambda x: _contrastive(x, rows, loss)[0], torch.tensor(case.student, requires_grad=True))


@seeds
@kinds
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_without_a_margin_all_are_infonce(seed, kind, temperature):
    """Which is the cross-entropy of the row's own column."""
    case = random_case(seed, 6, 9, 2)
    total, gradient, _ = value(case, settings(kind, 0.0, temperature))
    student = torch.tensor(case.student, requires_grad=True)
    own = F.one_hot(torch.tensor(case.column), 9).bool()
    logits = (student / temperature).masked_fill(~(own | torch.tensor(case.negative)), -torch.inf)
    want = F.cross_entropy(logits[case.anchor], torch.tensor(case.column[case.anchor]), reduction="sum")
    assert total == pytest.approx(want.item(), abs=1e-9)
    np.testing.assert_allclose(gradient, grad(want, student)[0], rtol=0, atol=1e-9)


@seeds
@pytest.mark.parametrize("kind", ["infonce", "arccse"])
def test_the_teacher_has_no_say_in_them(seed, kind):
    case, other = random_case(seed, 6, 9, 2), random_case(seed, 6, 9, 2)
    other.teacher = -other.teacher
    assert value(case, settings(kind, 0.3))[0] == value(other, settings(kind, 0.3))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("agreed", [1.0, 1.0000001])  # rounding may pass 1
def test_negatives_that_the_teacher_finds_equal_have_no_margin(dtype, agreed):
    case = random_case(1, 6, 9, 2)
    case.teacher[:] = agreed
    found, plain = (value(case, settings(kind, 0.6), dtype) for kind in ("kdmcse", "infonce"))
    assert found[0] == pytest.approx(plain[0], abs=1e-12 if (dtype, agreed) == (torch.float64, 1.0) else 1e-5)
    case.teacher[:] = 0.5
    assert value(case, settings("kdmcse", 0.6), dtype)[0] > plain[0] + 0.1  # less sure, the loss is larger


def test_margins_in_closed_form():
    case = one_row([0.0, 0.0, 0.0], 0.2)  # all angles pi / 2
    pushed = value(case, settings("arccse", 0.3, 0.5))[0]
    assert pushed == pytest.approx(math.log(1 + 2 * math.exp(math.sin(0.3) / 0.5)), abs=1e-12)
    pushed = value(case, settings("kdmcse", 0.3, 0.5))[0]
    assert pushed == pytest.approx(math.log(1 + 2 * math.exp(math.sin(0.8 * 0.3) / 0.5)), abs=1e-12)


def test_only_negatives_wider_than_the_margin_are_narrowed():
    """By (1 - s) m, at once: the logit jumps there."""
    near, wide = (one_row([0.4, math.cos(angle)], 0.2) for angle in (0.3 - 1e-6, 0.3 + 1e-6))
    below, above = (value(case, settings("kdmcse", 0.3))[0] for case in (near, wide))
    assert below == pytest.approx(math.log(1 + math.exp(math.cos(0.3) - 0.4)), abs=1e-5)
    assert above == pytest.approx(math.log(1 + math.exp(math.cos(0.3 - 0.8 * 0.3) - 0.4)), abs=1e-5)


@kinds
def test_temperature(kind):
    """Towards 0 what counts is by how much the hardest negative wins."""
    case = one_row([0.1, 0.3, -0.5], 0.2)
    wide, cold = (value(case, settings(kind, 0.3, temperature))[0] for temperature in (1e6, 1e-3))
    assert wide == pytest.approx(math.log(3), abs=1e-5)
    hardest = {"infonce": 0.3, "arccse": 0.3, "kdmcse": math.cos(math.acos(0.3) - 0.8 * 0.3)}
    shift = 0.3 * math.acos(0.2)
    hardest["mcl"] = math.cos(math.acos(0.3) - shift)
    own = {"arccse": math.cos(math.acos(0.1) + 0.3), "mcl": math.cos(math.acos(0.1) + shift)}.get(kind, 0.1)
    assert 1e-3 * cold == pytest.approx(hardest[kind] - own, abs=1e-9)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [-1.0, 0.3, 1.0])
def test_angles_of_zero_and_pi(kind, dtype, teacher):
    loss = settings(kind, 0.4, 0.5)
    for own in (-1.0, 1.0, -1.0000001, 1.0000001):
        total, gradient, _ = value(one_row([own, 1.0, -1.0], teacher), loss, dtype)
        assert math.isfinite(total) and np.isfinite(gradient).all()
    far, near = one_row([-1.0, 0.2, -0.1], teacher), one_row([0.2, 1.0, -0.1], teacher)
    assert value(far, loss, dtype)[1][0, 0] < -1e-3  # descent raises the positive
    assert value(near, loss, dtype)[1][0, 1] > 1e-3  # and lowers the negative


@kinds
@pytest.mark.parametrize("missing", ["anchor", "negative"])
def test_nothing_to_contrast_gives_exactly_zero(kind, missing):
    case = random_case(5, 4, 6, 1)
    case.student[0], case.student[1] = 1.0, -1.0
    assert value(case, settings(kind, 0.3))[0] > 0.1
    getattr(case, missing)[:] = False
    assert value(case, settings(kind, 0.3))[0] == 0.0 and not value(case, settings(kind, 0.3))[1].any()


@kinds
def test_one_column_alone_gives_exactly_zero(kind):
    total, gradient, counts = value(one_row([0.3], 0.2), settings(kind, 0.3))
    assert total == 0.0 and not gradient.any() and counts == [0, 1]


@kinds
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_ranks_and_both_directions(kind, symmetric):
    """The parts add up to the whole, which is the mean of the directions that the reference knows one by one."""
    first, second = torch.tensor(np.random.default_rng(0).normal(size=(2, 8, 5)), requires_grad=True)
    loss = settings(kind, 0.3, 0.5, mcl_symmetric=symmetric)
    cases = [random_case(seed, 8, 8, 0) for seed in (1, 2)[: 1 + symmetric]]

    def terms(own):
        rows = [rows_of(case) for case in cases]
        for one, case in zip(rows, cases, strict=True):
            one.keep, one.labels = torch.tensor(case.negative), torch.ones(8, dtype=torch.int64)
            one.off_diagonal = one.keep
        rows = [SimpleNamespace(**{name: values[own] for name, values in vars(one).items()}) for one in rows]
        return contrast_terms(first[own], second[own], first, second, rows, loss)

    whole, *parts = (terms(slice(*own)) for own in ((0, 8), (0, 3), (3, 4), (4, 8)))
    for name in ("contrastive", "margin", "distance"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    sides = [(first, second), (second, first)]
    wanted = []
    for case, side in zip(cases, sides, strict=False):
        case.student = cosine_matrix(*side).detach().numpy()
        if kind == "mcl":
            masks = case.anchor, case.negative, case.column
            wanted.append(reference.contrastive_sum(case.student, case.teacher, *masks, 0.3, 0.5, "negative")[0])
        else:
            wanted.append(expected(kind, case, 0.3, 0.5)[0])
    assert whole.contrastive.item() == pytest.approx(np.mean(wanted), abs=1e-10)
    kept = torch.tensor(cases[0].negative)
    torch.testing.assert_close(
        whole.distance, distance_sum(cosine_matrix(first, second), torch.tensor(cases[0].teacher), kept)
    )


def test_every_loss_has_a_formula_and_a_source():
    choices = get_args(LossConfig.model_fields["contrastive"].annotation)
    assert set(FORMULAS) == {"sup", "dist", *choices} and set(KINDS) == set(choices)
    assert len({formula for formula, _ in FORMULAS.values()}) == len(FORMULAS)
    for text in (SYMBOLS, *(part for both in FORMULAS.values() for part in both)):
        assert text and "\n" not in text
