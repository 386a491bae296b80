"""Similarities and labels that the tests of the noise report share."""

import numpy as np

from flipkd_dist.contradictions import ContradictoryPair

POSITIVES, NEGATIVES = [0.9, 0.8, 0.5, 0.4], [0.1, 0.4999, 0.5, 0.6]
LABELLED = np.array(POSITIVES + NEGATIVES, np.float32), np.array([1] * 4 + [0] * 4)
OFF_DIAGONAL = np.array([0.0, 0.2, 0.3, 0.45, 0.55], np.float32)
NOTHING = np.zeros(0)

HOSTILE = (
    "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} </body>",
    "我的卡还没有到 🏦💳",
    "x" * 5000,
    "أين بطاقتي؟ \u202e reversed",
    "bell \x07 escape \x1b[31m red \x00 lone \ud800 surrogate\nsecond line",
    "",
)


def narrow(low, high, num=400):
    """An encoder that puts every cosine between `low` and `high`, matches in the upper half."""
    similarity = np.linspace(low, high, num, dtype=np.float32)
    return similarity, (np.arange(num) >= num // 2).astype(int), similarity[: num // 2]


def hostile_pairs():
    return [ContradictoryPair(0.9, 0, text, HOSTILE[row - 1], f"file:{row}") for row, text in enumerate(HOSTILE)]


def degenerate_cases():
    """(name, similarity, label, off-diagonal, theta) of everything that is not a plain file of pairs."""
    similarity, label = LABELLED
    return [
        ("positives alone", similarity, np.ones(8, int), OFF_DIAGONAL, 0.5),
        ("negatives alone", similarity, np.zeros(8, int), OFF_DIAGONAL, 0.5),
        ("no pairs", NOTHING, NOTHING, NOTHING, 0.5),
        ("off-diagonal alone", NOTHING, NOTHING, OFF_DIAGONAL, 0.5),
        ("no off-diagonal", similarity, label, NOTHING, 0.5),
        ("all equal", np.full(8, 0.7), label, np.full(5, 0.7), 0.5),
        ("all equal to 1", np.ones(8), label, np.ones(5), 0.5),
        ("the wrong way round", np.array([0.9, 0.8, 0.3]), np.array([0, 0, 1]), OFF_DIAGONAL, 0.5),
        ("one pair", similarity[:1], label[:1], NOTHING, 0.5),
        ("filter off", similarity, label, OFF_DIAGONAL, None),
        ("a theta of the user's", similarity, label, OFF_DIAGONAL, 0.37),
        ("theta 0", similarity, label, OFF_DIAGONAL, 0.0),
        ("theta 1", similarity, label, OFF_DIAGONAL, 1.0),
        ("negative cosines", -similarity, label, -OFF_DIAGONAL, 0.5),
        ("logits", (similarity - 0.5) * 30, label, OFF_DIAGONAL * -40, 0.5),
        ("not finite", np.append(similarity, [np.nan, np.inf]), np.append(label, [1, 0]), OFF_DIAGONAL, 0.5),
        ("nothing finite", np.full(8, np.nan), label, np.full(5, np.nan), 0.5),
    ]
