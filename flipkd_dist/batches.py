"""Texts of pairs to the packed batch of one forward."""

from flipkd_dist.packing import PackedBatch, pack
from flipkd_dist.prompt import EncodedPair, PairEncoder
from flipkd_dist.student import Student


class BatchMaker:
    """Pairs to the packed batch of one forward; a rank without pairs gets one dummy pair, which nothing counts."""

    def __init__(self, encoder: PairEncoder, student: Student, share_prefix: bool):
        """
        Args:
            share_prefix: whether that is exact (`base.shares_prefix`); a student whose attention cannot does without.
        """
        self.encoder, self.share_prefix = encoder, share_prefix and student.shares_prefix

    def __call__(self, texts: list[tuple[str, str]]) -> PackedBatch:
        return self.of_encoded([self.encoder.encode(a, b) for a, b in texts or [("a", "a")]])

    def of_encoded(self, pairs: list[EncodedPair]) -> PackedBatch:
        """The batch of pairs, at least one, that the encoder has turned into tokens already."""
        return pack(self.encoder.prefix, pairs, self.share_prefix, blank=self.encoder.blank)
