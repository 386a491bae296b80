"""The losses of FlipKD as pure functions: tensors in, sums out.

Shapes: n pairs of the contrast batch (one micro-step over all ranks), m of them are this rank's own rows,
r the width of a read-out. Rows are first texts, columns second texts. Sums are divided by counts of the whole
optimizer step in one place, `flipkd_dist.step`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# How far cosines are kept from +-1 inside arccos, whose derivative is infinite there.
ARCCOS_EPS = {torch.float32: 1e-6, torch.float64: 1e-12}


def at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _angle(cosine: Tensor) -> Tensor:
    limit = 1.0 - ARCCOS_EPS[cosine.dtype]
    return torch.arccos(cosine.clamp(-limit, limit))


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between the rows of `a` [m, r] and of `b` [n, r]: [m, n], fp32 (float64 stays). FlipKD, Eq 2."""
    a, b = at_least_fp32(a), at_least_fp32(b)
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def alone_logits(a: Tensor, b: Tensor) -> Tensor:
    """Logits [m, 2] of texts encoded alone, from their read-outs [m, r]: p(match) is (1 + cosine) / 2.

    Half the length of the sum and of the difference of unit vectors, squared, are p and 1 - p; as `1 - cosine` the
    latter would lose its digits where the texts are close.
    """
    a, b = (F.normalize(at_least_fp32(side), dim=-1) for side in (a, b))
    shares = torch.stack([(a + b).square().sum(dim=-1), (a - b).square().sum(dim=-1)], dim=-1) / 4
    return shares.clamp(min=ARCCOS_EPS[shares.dtype]).log()


def supervised_sum(answer_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the binary cross-entropies of p(match).

    Args:
        answer_logits: [m, 2], column 0 is the logit of "yes", column 1 of "no".
        labels: [m] int64, 1 = match.
    Source: FlipKD, section 3 (L_sup).
    """
    return F.cross_entropy(at_least_fp32(answer_logits), 1 - labels, reduction="sum")


def noise_filter(teacher_similarity: Tensor, match: Tensor, threshold: float | None) -> Tensor:
    """Where the teacher agrees enough with the label to be listened to: bool [m, n]. FlipKD, Eq 3.

    Args:
        teacher_similarity: [m, n] cosines.
        match: bool [m, n], True where the entry counts as a match.
        threshold: theta; None keeps everything.
    """
    if threshold is None:
        return torch.ones_like(match)
    return torch.where(match, teacher_similarity >= threshold, teacher_similarity < 1 - threshold)


def distance_sum(student_similarity: Tensor, teacher_similarity: Tensor, keep: Tensor) -> Tensor:
    """Sum of the squared differences of the kept similarities (all [m, n]). FlipKD, Eq 4 without 1/n."""
    return ((teacher_similarity - student_similarity).square() * keep).sum()


def contrastive_sum(
    student_similarity: Tensor,
    teacher_similarity: Tensor,
    anchor: Tensor,
    negative: Tensor,
    positive_column: Tensor,
    margin: float,
    temperature: float = 1.0,
    negative_margin: str = "negative",
) -> tuple[Tensor, Tensor]:
    """Margin-aware contrastive loss (L_MCL), summed over the anchors.

    An angle that the margin pushes out of [0, pi] continues as the plain cosine plus the constant that makes it
    continuous, so that the gradient keeps its sign exactly where the push is needed.

    Args:
        student_similarity, teacher_similarity: [m, n] cosines.
        anchor: bool [m], rows that have a kept positive.
        negative: bool [m, n], kept negatives; the positive's own column is ignored.
        positive_column: [m] int64, the column of each row's own pair.
        margin: m_c, a factor on the teacher's angle.
        temperature: divides every cosine after the margin.
        negative_margin: "negative" takes each negative's own teacher angle, "anchor" that of the anchor's pair.
    Returns:
        The sum (exactly 0, still connected to the graph, without anchors) and [2] float counts: anchors' entries
        (positives and negatives) that left [0, pi], and all such entries.
    Source: FlipKD, Eq 5 and 6.
    """
    own = positive_column.unsqueeze(1)
    teacher_angle = _angle(teacher_similarity)
    own_teacher_angle = teacher_angle.gather(1, own)

    positive = student_similarity.gather(1, own)
    shift = margin * own_teacher_angle
    angle = _angle(positive) + shift
    # Within eps of the far end arccos has no gradient to give: the plain cosine takes over there too.
    limit = 1.0 - ARCCOS_EPS[student_similarity.dtype]
    positive_out = (angle > torch.pi) | (positive < -limit)
    positive_logit = torch.where(positive_out, positive - 1 + torch.cos(shift), torch.cos(angle))

    shift = margin * (teacher_angle if negative_margin == "negative" else own_teacher_angle)
    angle = _angle(student_similarity) - shift
    negative_out = (angle < 0) | (student_similarity > limit)
    negative_logit = torch.where(negative_out, student_similarity + 1 - torch.cos(shift), torch.cos(angle))

    used = (negative & anchor.unsqueeze(1)).scatter(1, own, False)
    logits = torch.cat([positive_logit, negative_logit.masked_fill(~used, -torch.inf)], dim=1) / temperature
    per_row = torch.logsumexp(logits, dim=1) - logits[:, 0]
    total = (per_row * anchor).sum()

    anchor_positive_out = positive_out.squeeze(1) & anchor
    out = anchor_positive_out.sum() + (negative_out & used).sum()
    return total, torch.stack([out, anchor.sum() + used.sum()]).to(total.dtype)
