"""Texts of pairs to the packed batch of one forward."""

from flipkd_dist.packing import PackedBatch, pack, plan_rows
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.student import Student


class BatchMaker:
    """Pairs to the packed batch of one forward; a rank without pairs gets one dummy pair, which nothing counts."""

    def __init__(self, encoder: PairEncoder, student: Student, share_prefix: bool):
        self.encoder, self.share_prefix = encoder, share_prefix
        self.cost = student.cost_of(student.model.config)

    def __call__(self, texts: list[tuple[str, str]]) -> PackedBatch:
        pairs = [self.encoder.encode(a, b) for a, b in texts or [("a", "a")]]
        prefix = self.encoder.prefix
        rows = plan_rows([len(pair.ids) for pair in pairs], len(prefix), self.cost, self.share_prefix)
        return pack(prefix, pairs, rows, blank=self.encoder.blank)
