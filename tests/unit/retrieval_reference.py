"""Metrics of one ranking in float64, slowly, from their definitions."""

import math


def reference_order(scores: dict[str, float]) -> list[str]:
    """Documents by falling score as float32, equal ones by falling id in UTF-8: the rule of trec_eval."""
    import struct

    as_float32 = {name: struct.unpack("f", struct.pack("f", score))[0] for name, score in scores.items()}
    return sorted(scores, key=lambda name: (as_float32[name], name.encode()), reverse=True)


def reference_metrics(order: list[str], grades: dict[str, int]) -> dict[str, float]:
    gains = [max(grades.get(name, 0), 0) for name in order]
    relevant = sum(grade > 0 for grade in grades.values())
    hits = [number for number, gain in enumerate(gains, 1) if gain > 0]
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:10]
    return {
        "ndcg@10": discounted(gains[:10]) / discounted(ideal),
        "mrr@10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
        "map": math.fsum(count / place for count, place in enumerate(hits, 1)) / relevant,
        **{f"recall@{k}": sum(place <= k for place in hits) / relevant for k in (1, 10, 100)},
    }


def discounted(gains: list[int]) -> float:
    return math.fsum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))
