"""The torch losses against the slow reference in loss_reference.py, and their behaviour at the edges."""

import math
from types import SimpleNamespace

import loss_reference as reference
import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck

from flipkd_dist import losses

layouts = pytest.mark.parametrize("m, n, start", [(7, 7, 0), (4, 9, 3), (1, 6, 5)])  # own rows, all pairs, first row
seeds = pytest.mark.parametrize("seed", [0, 1, 2])
settings = pytest.mark.parametrize("negative_margin", ["negative", "anchor"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_case(seed, m, n, start):
    """Random inputs, cosines away from +-1; row 0 is an anchor far from its partner and near a negative, row 1 none."""
    rng = np.random.default_rng(seed)
    case = SimpleNamespace(column=np.arange(start, start + m), match=rng.random((m, n)) < 0.5)
    case.student, case.teacher = rng.uniform(-0.97, 0.97, (2, m, n))
    case.student[0, start], case.student[0, (start + 1) % n] = -0.9, 0.9
    case.teacher[0, start], case.teacher[0, (start + 1) % n] = 0.2, 0.1
    case.anchor, case.negative = rng.random(m) < 0.6, rng.random((m, n)) < 0.6
    case.anchor[:2], case.negative[0, (start + 1) % n] = [True, False][:m], True
    return case


def one_row(student, teacher):
    """A case of one anchor: column 0 is the positive, the others are negatives."""
    student, negative = np.array([student]), np.arange(len(student))[None] > 0
    case = SimpleNamespace(student=student, negative=negative, anchor=np.array([True]), column=np.array([0]))
    return SimpleNamespace(teacher=np.full(student.shape, teacher), **vars(case))


def contrastive(case, margin, temperature=1.0, negative_margin="negative", dtype=torch.float64):
    """The torch loss of a case and its gradient by the student's cosines."""
    student = torch.tensor(case.student, dtype=dtype, requires_grad=True)
    margins = losses.mcl_margins(
        torch.tensor(case.teacher, dtype=dtype), torch.tensor(case.column), margin, negative_margin
    )
    masks = map(torch.tensor, (case.anchor, case.negative, case.column))
    total, shares = losses.contrastive_sum(student, margins, *masks, temperature)
    assert total.shape == () and torch.isfinite(shares).all()
    return total.item(), grad(total, student)[0].numpy()


def expected(case, *settings):
    """The reference's (sum, [positives out of range, negatives out of range]) of a case."""
    return reference.contrastive_sum(case.student, case.teacher, case.anchor, case.negative, case.column, *settings)


@seeds
def test_supervised_sum(seed):
    logits, labels = np.random.default_rng(seed).normal(0, 3, (6, 2)), torch.tensor([1, 0, 1, 1, 0, 0])
    logits[0], logits[1] = [-900, 900], [900, -900]  # the logarithm of a softmax is inf here
    for dtype, atol in ((torch.float64, 1e-10), (torch.bfloat16, 1e-3)):  # bf16 is added up in float32
        x = torch.tensor(logits, dtype=dtype, requires_grad=True)
        total = losses.supervised_sum(x, labels)
        want = reference.supervised_sum(x.detach().double().numpy(), labels.tolist())
        assert total.shape == () and total.item() == pytest.approx(want, abs=atol)
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradcheck(lambda x: losses.supervised_sum(x, labels[2:]), torch.tensor(logits[2:], requires_grad=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("theta", [0.5, 0.25, 0.75])  # exact in binary, and so is 1 - theta
def test_noise_filter_corners(theta, dtype):
    theta_below, other_below = (np.nextafter(dtype(x), dtype(-1)) for x in (theta, 1 - theta))
    alpha = np.array([[theta, theta_below, 1 - theta, other_below]], dtype=dtype)
    keep = losses.noise_filter(torch.tensor(alpha), torch.tensor([[True, True, False, False]]), theta)
    assert keep.dtype == torch.bool and keep.tolist() == [[True, False, False, True]]


@seeds
@layouts
@pytest.mark.parametrize("theta", [0.5, 0.3, 0.8, None])
def test_noise_filter_and_distance_sum(seed, m, n, start, theta):
    case = random_case(seed, m, n, start)
    student, teacher = torch.tensor(case.student, requires_grad=True), torch.tensor(case.teacher)
    keep = losses.noise_filter(teacher, torch.tensor(case.match), theta)
    assert keep.dtype == torch.bool and (theta is not None or keep.all())
    assert np.array_equal(keep, reference.noise_filter(case.teacher, case.match, theta))
    total, want = losses.distance_sum(student, teacher, keep), reference.distance_sum(case.student, case.teacher, keep)
    assert want > 0.01 and total.shape == () and total.item() == pytest.approx(want, abs=1e-10)
    assert gradcheck(lambda x: losses.distance_sum(x, teacher, keep), student)
    nothing = losses.distance_sum(student, teacher, torch.zeros_like(keep))
    assert nothing.item() == 0.0 and not grad(nothing, student)[0].any()


@seeds
@layouts
@settings
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.06, 0.9])
def test_contrastive_sum(seed, m, n, start, negative_margin, temperature, margin):
    case = random_case(seed, m, n, start)
    total, gradient = contrastive(case, margin, temperature, negative_margin)
    want, out_of_range = expected(case, margin, temperature, negative_margin)
    assert want > 0.1 and total == pytest.approx(want, abs=1e-10)
    assert margin < 0.9 or min(out_of_range) > 0  # the large margin reaches both continuations
    in_loss = case.anchor[:, None] & case.negative & (np.arange(n) != case.column[:, None])  # j' is not i
    in_loss[np.arange(m), case.column] = in_loss.any(axis=1)
    assert np.array_equal(gradient != 0, in_loss)  # exactly zero in other rows and at masked entries


@settings
@pytest.mark.parametrize("margin", [0.06, 0.9])
def test_contrastive_gradcheck(margin, negative_margin):
    case = random_case(4, 5, 8, 2)
    margins = losses.mcl_margins(torch.tensor(case.teacher), torch.tensor(case.column), margin, negative_margin)
    args = margins, *map(torch.tensor, (case.anchor, case.negative, case.column)), 0.5
    assert margin < 0.9 or min(expected(case, margin, 0.5, negative_margin)[1]) > 0
    assert gradcheck(lambda x: losses.contrastive_sum(x, *args)[0], torch.tensor(case.student, requires_grad=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_contrastive_closed_form(temperature):
    push = math.sin(0.06 * math.pi / 2) / temperature  # all angles pi/2: positive at -push, two negatives at +push
    total, _ = contrastive(one_row([0.0, 0.0, 0.0], 0.0), 0.06, temperature)
    assert total == pytest.approx(math.log(1 + 2 * math.exp(2 * push)), abs=1e-10)


@settings
@pytest.mark.parametrize("column, sign", [(0, -1), (1, 1)])
def test_value_is_continuous_where_the_angle_leaves_its_range(negative_margin, column, sign):
    boundary, around, out_of_range = sign * math.cos(0.9 * math.acos(0.2)), [], []
    for step in (-1e-7, 1e-7):
        case = one_row([0.1, -0.2, 0.3], 0.2)
        case.student[0, column] = boundary + step
        want, counts = expected(case, 0.9, 0.5, negative_margin)
        around.append(contrastive(case, 0.9, 0.5, negative_margin)[0])
        out_of_range.append(counts[column])
        assert around[-1] == pytest.approx(want, abs=1e-10)
    assert sorted(out_of_range) == [0, 1] and around[0] == pytest.approx(around[1], abs=1e-6)


@dtypes
@settings
@pytest.mark.parametrize("margin", [0.0, 0.06, 0.9])
@pytest.mark.parametrize("teacher", [-1.0, 0.3, 1.0])
def test_cosines_of_exactly_one(dtype, negative_margin, margin, teacher):
    for positive in (-1.0, 1.0, -1.0000001, 1.0000001):  # rounding may pass 1
        total_and_gradient = contrastive(one_row([positive, 1.0, -1.0], teacher), margin, 1.0, negative_margin, dtype)
        assert all(np.isfinite(x).all() for x in total_and_gradient)
    far, near = one_row([-1.0, 0.2, -0.1], teacher), one_row([0.2, 1.0, -0.1], teacher)
    assert contrastive(far, margin, 1.0, negative_margin, dtype)[1][0, 0] < -1e-3  # descent raises the positive
    assert contrastive(near, margin, 1.0, negative_margin, dtype)[1][0, 1] > 1e-3  # and lowers the negative
    if margin == 0.9 and teacher == 0.3 and dtype == torch.float64:  # out of range the cosine itself goes on, unclamped
        for case in (far, near):
            total, want = (f(case, margin, 1.0, negative_margin)[0] for f in (contrastive, expected))
            assert total == pytest.approx(want, abs=1e-13)


@dtypes
@settings
@pytest.mark.parametrize("missing", ["anchor", "negative"])
def test_nothing_to_contrast_gives_exactly_zero(dtype, negative_margin, missing):
    case = random_case(5, 4, 6, 1)
    case.student[0], case.student[1], case.teacher[:2, ::2] = 1.0, -1.0, 1.0  # arccos is steepest here
    assert contrastive(case, 0.06, 1.0, negative_margin, dtype)[0] > 0.1
    getattr(case, missing)[:] = False
    total, gradient = contrastive(case, 0.06, 1.0, negative_margin, dtype)
    assert total == 0.0 and np.array_equal(gradient, np.zeros((4, 6)))


@seeds
@settings
def test_rows_split_over_ranks_sum_to_the_whole(seed, negative_margin):
    case = random_case(seed, 10, 10, 0)
    case.anchor[3:5] = False  # the second rank has no anchor
    first, second = torch.tensor(np.random.default_rng(seed).normal(size=(2, 10, 5)), requires_grad=True)
    inputs = [torch.tensor(x) for x in (case.teacher, case.match, case.anchor, case.negative, case.column)]

    def sums(own):
        teacher, keep, *masks = (x[own] for x in inputs)
        student = losses.cosine_matrix(first[own], second)
        margins = losses.mcl_margins(teacher, masks[-1], 0.9, negative_margin)
        contrast, _ = losses.contrastive_sum(student, margins, *masks)
        return losses.distance_sum(student, teacher, keep), contrast

    ranks = [sums(slice(*own)) for own in [(0, 3), (3, 5), (5, 10)]]
    for whole, *parts in zip(sums(slice(0, 10)), *ranks, strict=True):
        want, got = (grad(x, (first, second), retain_graph=True) for x in (whole, sum(parts)))
        assert whole > 0.1 and min(x.norm() for x in want) > 0.1
        torch.testing.assert_close((sum(parts), *got), (whole, *want), rtol=0, atol=1e-10)


@seeds
def test_cosine_matrix(seed):
    a, b = torch.tensor(np.random.default_rng(seed).normal(0, 10, (8, 6))).split([3, 5])
    want = torch.tensor(reference.cosine_matrix(a, b))
    torch.testing.assert_close(losses.cosine_matrix(a, b), want, rtol=0, atol=1e-10)
    half = a.bfloat16(), b.bfloat16()
    want = torch.tensor(reference.cosine_matrix(*(x.double() for x in half)), dtype=torch.float32)
    torch.testing.assert_close(losses.cosine_matrix(*half), want, rtol=0, atol=1e-6)  # and so its dtype is float32
    assert gradcheck(losses.cosine_matrix, (a.clone().requires_grad_(), b.clone().requires_grad_()))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in ([[0.0, 0], [1, 2]], [[3.0, -1], [0, 0]]))
        cosines = losses.cosine_matrix(a, b)
        assert all(torch.isfinite(x).all() for x in (cosines, *grad(cosines.sum(), (a, b))))


@dtypes
@seeds
def test_l_sup_of_texts_alone(dtype, seed):
    """p(match) = (1 + cosine) / 2 in float64, close texts and opposite ones among them; its gradient too."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 6, 8))
    b[0], b[1] = 2 * a[0] + 0.02 * b[0], -a[1] + 0.02 * b[1]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    sides = [torch.tensor(side, dtype=dtype, requires_grad=True) for side in (a, b)]
    logits = losses.alone_logits(*sides)
    total = losses.supervised_sum(logits, labels)
    exact = [torch.tensor(side, requires_grad=True) for side in (a, b)]
    p = (1 + torch.cosine_similarity(*exact, dim=1)) / 2
    want = -torch.where(labels == 1, p, 1 - p).log().sum()
    torch.testing.assert_close(logits.double(), torch.stack([p, 1 - p], dim=1).log(), rtol=0, atol=1e-4)
    relative = 1e-4 if dtype == torch.float32 else 1e-8
    assert total.item() == pytest.approx(want.item(), rel=relative) and p[0] > 0.999 and p[1] < 1e-3
    for found, wanted in zip(grad(total, sides), grad(want, exact), strict=True):
        assert (found - wanted).norm() / wanted.norm() < 10 * relative


def test_equal_texts_alone_have_a_finite_loss_and_no_gradient():
    a = torch.randn(2, 5, requires_grad=True)
    logits = losses.alone_logits(a, torch.stack([a[0], -a[1]]))
    assert logits.detach().tolist() == [pytest.approx([0, -13.8155], abs=1e-4), pytest.approx([-13.8155, 0], abs=1e-4)]
    total = losses.supervised_sum(logits, torch.tensor([0, 1]))  # as wrong as can be
    assert grad(total, a)[0].abs().max() < 1e-6


def test_texts_alone_are_read_in_fp32():
    a, b = torch.randn(2, 3, 5).bfloat16()
    assert torch.equal(losses.alone_logits(a, b), losses.alone_logits(a.float(), b.float()))
    assert torch.equal(losses.alone_logits(a, b), losses.alone_logits(b, a))
