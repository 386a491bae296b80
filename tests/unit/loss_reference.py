"""Slow float64 reference of the FlipKD losses: explicit loops over NumPy arrays, written from the paper's equations.

m = own rows, n = all pairs of the contrast batch, r = size of a representation. Nothing here imports the package.
"""

import math

import numpy as np


def supervised_sum(answer_logits, labels):
    """Sum over rows of -log p(label), p the softmax over (yes, no); label 1 is yes, which is column 0."""
    total = 0.0
    for (yes, no), label in zip(np.asarray(answer_logits, dtype=np.float64), labels, strict=True):
        right, wrong = (yes, no) if label == 1 else (no, yes)
        gap = float(wrong - right)  # -log(e^right / (e^right + e^wrong)) = log(1 + e^gap)
        total += gap + math.log1p(math.exp(-gap)) if gap > 0 else math.log1p(math.exp(gap))
    return total


def cosine_matrix(a, b):
    """Eq 2: the cosine of every row of a [m, r] with every row of b [n, r], none of them zero."""
    out = np.zeros((len(a), len(b)))
    for i, left in enumerate(np.asarray(a, dtype=np.float64)):
        for j, right in enumerate(np.asarray(b, dtype=np.float64)):
            dot = sum(x * y for x, y in zip(left, right, strict=True))
            out[i, j] = dot / math.sqrt(sum(x * x for x in left)) / math.sqrt(sum(y * y for y in right))
    return out


def noise_filter(teacher_similarity, match, threshold):
    """Eq 3: phi [m, n], False where the teacher contradicts the label."""
    phi = np.ones(match.shape, dtype=bool)
    if threshold is None:
        return phi
    for i, j in np.ndindex(*match.shape):
        alpha = teacher_similarity[i, j]
        if match[i, j] and alpha < threshold:
            phi[i, j] = False
        if not match[i, j] and alpha >= 1 - threshold:
            phi[i, j] = False
    return phi


def distance_sum(student_similarity, teacher_similarity, keep):
    """Eq 4 without its 1/n: the sum over kept entries of the squared difference."""
    total = 0.0
    for i, j in np.ndindex(*keep.shape):
        if keep[i, j]:
            total += (float(teacher_similarity[i, j]) - float(student_similarity[i, j])) ** 2
    return total


def positive_value(student_cosine, shift):
    """The value cos(theta + shift) and whether the angle passed pi, where cos(theta) goes on shifted to meet -1."""
    angle = math.acos(student_cosine) + shift
    if angle <= math.pi:
        return math.cos(angle), False
    boundary = math.pi - shift  # the theta at which the angle is exactly pi
    return student_cosine + (math.cos(math.pi) - math.cos(boundary)), True


def negative_value(student_cosine, shift):
    """The value cos(theta - shift) and whether the angle fell below 0, where cos(theta) goes on shifted to meet 1."""
    angle = math.acos(student_cosine) - shift
    if angle >= 0:
        return math.cos(angle), False
    boundary = shift  # the theta at which the angle is exactly 0
    return student_cosine + (math.cos(0.0) - math.cos(boundary)), True


def contrastive_sum(
    student_similarity, teacher_similarity, anchor, negative, positive_column, margin, temperature, negative_margin
):
    """Eq 5 and 6: the sum of L_i over anchors, and the numbers of positives and negatives that left [0, pi]."""
    total, out_of_range = 0.0, [0, 0]
    for i in range(len(anchor)):
        if not anchor[i]:
            continue
        own = int(positive_column[i])
        own_angle = math.acos(teacher_similarity[i, own])
        value, left = positive_value(float(student_similarity[i, own]), margin * own_angle)
        out_of_range[0] += left
        positive = math.exp(value / temperature)
        others = 0.0
        for j in range(student_similarity.shape[1]):
            if j == own or not negative[i, j]:
                continue
            angle = own_angle if negative_margin == "anchor" else math.acos(teacher_similarity[i, j])
            value, left = negative_value(float(student_similarity[i, j]), margin * angle)
            out_of_range[1] += left
            others += math.exp(value / temperature)
        total += -math.log(positive / (positive + others))
    return total, out_of_range


def baseline_sum(kind, student, teacher, anchor, negative, positive_column, margin, temperature):
    """The sums of InfoNCE, ArcCSE and AdapACSE over anchors, from their papers' equations; numbers out of range too."""
    total, out_of_range = 0.0, [0, 0]
    for i in range(len(anchor)):
        if not anchor[i]:
            continue
        own = int(positive_column[i])
        value, left = positive_value(float(student[i, own]), margin) if kind == "arccse" else (student[i, own], False)
        out_of_range[0] += left
        scores = [value / temperature]  # the positive comes first
        for j in range(student.shape[1]):
            if j == own or not negative[i, j]:
                continue
            cosine = float(student[i, j])
            if kind == "kdmcse" and math.acos(cosine) > margin:
                cosine, left = negative_value(cosine, abs(1 - float(teacher[i, j])) * margin)
                out_of_range[1] += left
            scores.append(cosine / temperature)
        total -= math.log(math.exp(scores[0]) / sum(math.exp(score) for score in scores))
    return total, out_of_range
