"""Texts of pairs to the packed batch of one forward."""

from collections.abc import Sequence

from flipkd_dist.packing import PackedBatch, pack
from flipkd_dist.prompt import EncodedPair, EncodedText, PairEncoder, TextEncoder
from flipkd_dist.student import Student
from flipkd_dist.text_packing import pack_texts


class BatchMaker:
    """Pairs to the packed batch of one forward; a rank without pairs gets one dummy pair, which nothing counts."""

    def __init__(self, encoder: PairEncoder | TextEncoder, student: Student, share_prefix: bool):
        """
        Args:
            encoder: of the student's mode.
            share_prefix: whether that is exact (`base.shares_prefix`); a student whose attention cannot does without.
        """
        self.encoder, self.share_prefix = encoder, share_prefix and student.shares_prefix
        self.bidirectional = student.bidirectional

    def __call__(self, texts: list[tuple[str, str]]) -> PackedBatch:
        texts = texts or [("a", "a")]
        if isinstance(self.encoder, PairEncoder):
            return self.of_encoded([self.encoder.encode(a, b) for a, b in texts])
        numbers = {text: number for number, text in enumerate(dict.fromkeys(text for pair in texts for text in pair))}
        encoded = [self.encoder.encode(text) for text in numbers]
        return self.of_texts(encoded, [(numbers[a], numbers[b]) for a, b in texts])

    def of_encoded(self, pairs: list[EncodedPair]) -> PackedBatch:
        """The batch of pairs, at least one, that the encoder has turned into tokens already."""
        return pack(self.encoder.prefix, pairs, self.share_prefix, blank=self.encoder.blank)

    def of_texts(self, texts: list[EncodedText], pairs: Sequence[tuple[int, int]] | None = None) -> PackedBatch:
        """The batch of texts encoded alone, at least one.

        Args:
            pairs: numbers of each pair's texts; None: every text is a first one, and none a second.
        """
        return pack_texts(self.encoder.prefix, texts, pairs, self.share_prefix, self.bidirectional)
