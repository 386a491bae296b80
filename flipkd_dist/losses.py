"""The losses of FlipKD as pure functions: tensors in, sums out.

Shapes: n pairs of the contrast batch (one micro-step over all ranks), m of them are this rank's own rows,
r the width of a read-out. Rows are first texts, columns second texts. Sums are divided by counts of the whole
optimizer step in one place, `flipkd_dist.step`. All contrastive losses are one, `contrastive_sum`, and differ in the
angles by which they make it harder.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Margins:
    """By how much a contrastive loss widens the angle of each pair that matches and narrows that of each negative.

    In radians, >= 0 up to rounding; None: that side's logits are the cosines as they are. InfoNCE (van den Oord et al.
    2018, arXiv 1807.03748) has neither.
    """

    positive: Tensor | None = None  # [m, 1] or a scalar
    negative: Tensor | None = None  # [m, n] or [m, 1]


def mcl_margins(
    teacher_similarity: Tensor, positive_column: Tensor, margin: float, negative_margin: str = "negative"
) -> Margins:
    """Of L_MCL: the teacher's angles times `margin`. FlipKD, Eq 5.

    Args:
        teacher_similarity: [m, n] cosines.
        positive_column: [m] int64, the column of each row's own pair.
        margin: m_c.
        negative_margin: "negative" takes each negative's own teacher angle, "anchor" that of the anchor's pair.
    """
    angle = _angle(teacher_similarity)
    own = margin * angle.gather(1, positive_column.unsqueeze(1))
    return Margins(own, margin * angle if negative_margin == "negative" else own)


def arccse_margins(student_similarity: Tensor, margin: float) -> Margins:
    """Of ArcCSE: `margin` radians for every positive. Zhang et al. 2022, ArcCon."""
    return Margins(positive=student_similarity.new_tensor(margin))


def kdmcse_margins(student_similarity: Tensor, teacher_similarity: Tensor, margin: float) -> Margins:
    """Of AdapACSE: for negatives wider than `margin` radians, as much of it as the teacher sees them differ.

    Nearer ones have none, and the logit jumps at `margin`: so its authors' program has it.

    Args:
        student_similarity, teacher_similarity: [m, n] cosines.
    Source: KDMCSE, Nguyen et al. 2024.
    """
    wide = _angle(student_similarity.detach()) > margin
    return Margins(negative=margin * (1 - teacher_similarity) * wide)


def _logits(cosine: Tensor, shift: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
    """Cosines of angles moved by `sign` (1 or -1) times `shift`, and where these left [0, pi]: like `cosine` each."""
    if shift is None:
        return cosine, torch.zeros_like(cosine, dtype=torch.bool)
    angle = _angle(cosine) + sign * shift
    # Within eps of the far end arccos has no gradient to give: the plain cosine takes over there too.
    limit = 1.0 - ARCCOS_EPS[cosine.dtype]
    out = (angle > torch.pi if sign > 0 else angle < 0) | (sign * cosine < -limit)
    return torch.where(out, cosine - sign + sign * torch.cos(shift), torch.cos(angle)), out


def contrastive_sum(
    student_similarity: Tensor,
    margins: Margins,
    anchor: Tensor,
    negative: Tensor,
    positive_column: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each anchor's own pair among its negatives, summed over the anchors.

    An angle that the margin pushes out of [0, pi] continues as the plain cosine plus the constant that makes it
    continuous, so that the gradient keeps its sign exactly where the push is needed.

    Args:
        student_similarity: [m, n] cosines.
        margins: what makes it L_MCL, ArcCSE, AdapACSE or InfoNCE.
        anchor: bool [m], rows that have a kept positive.
        negative: bool [m, n], kept negatives; the positive's own column is ignored.
        positive_column: [m] int64, the column of each row's own pair.
        temperature: divides every cosine after the margin.
    Returns:
        The sum (exactly 0, still connected to the graph, without anchors) and [2] float counts: anchors' entries
        (positives and negatives) that left [0, pi], and all such entries.
    Source: FlipKD, Eq 6.
    """
    own = positive_column.unsqueeze(1)
    positive_logit, positive_out = _logits(student_similarity.gather(1, own), margins.positive, 1)
    negative_logit, negative_out = _logits(student_similarity, margins.negative, -1)

    used = (negative & anchor.unsqueeze(1)).scatter(1, own, False)
    logits = torch.cat([positive_logit, negative_logit.masked_fill(~used, -torch.inf)], dim=1) / temperature
    per_row = torch.logsumexp(logits, dim=1) - logits[:, 0]
    total = (per_row * anchor).sum()

    anchor_positive_out = positive_out.squeeze(1) & anchor
    out = anchor_positive_out.sum() + (negative_out & used).sum()
    return total, torch.stack([out, anchor.sum() + used.sum()]).to(total.dtype)


_FLIPKD = "Flipping Knowledge Distillation, ACL 2025, arXiv 2507.05617"

SYMBOLS = (
    "θ: the student's angle, τ: the teacher's, l and s: their cosines; i: an anchor, ii: its own pair, ij: a negative; "
    "φ: the noise filter, m: loss.margin, T: loss.temperature"
)
# Each loss's formula, in one line, and its source.
FORMULAS: dict[str, tuple[str, str]] = {
    "sup": ("mean of -log p(y), p = softmax(yes, no)", f"{_FLIPKD}, section 3"),
    "dist": ("Σᵢⱼ φᵢⱼ (sᵢⱼ - lᵢⱼ)² / Σᵢⱼ φᵢⱼ", f"{_FLIPKD}, Eq 4"),
    "mcl": (
        "mean of -log(P/(P + Σⱼ φᵢⱼNᵢⱼ)), P = exp(cos(θᵢᵢ + m τᵢᵢ)/T), Nᵢⱼ = exp(cos(θᵢⱼ - m τᵢⱼ)/T)",
        f"{_FLIPKD}, Eq 5 and 6",
    ),
    "infonce": (
        "mean of -log(P/(P + Σⱼ φᵢⱼNᵢⱼ)), P = exp(cos θᵢᵢ/T), Nᵢⱼ = exp(cos θᵢⱼ/T)",
        "van den Oord et al. 2018, arXiv 1807.03748",
    ),
    "arccse": (
        "mean of -log(P/(P + Σⱼ φᵢⱼNᵢⱼ)), P = exp(cos(θᵢᵢ + m)/T), Nᵢⱼ = exp(cos θᵢⱼ/T)",
        "ArcCSE: Zhang et al., ACL 2022, 2022.acl-long.336",
    ),
    "kdmcse": (
        "mean of -log(P/(P + Σⱼ φᵢⱼNᵢⱼ)), P = exp(cos θᵢᵢ/T), Nᵢⱼ = exp(cos(θᵢⱼ - [θᵢⱼ > m](1 - sᵢⱼ)m)/T)",
        "KDMCSE (AdapACSE): Nguyen et al., NAACL 2024, arXiv 2403.17486",
    ),
}
