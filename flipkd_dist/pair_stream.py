"""The labelled pairs of a run as a stream: read again for each pass, so that no number of them fills the memory."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from flipkd_dist.config import DataConfig
from flipkd_dist.key_table import KeyTable
from flipkd_dist.pairs import PairRecord, Places, stream_pairs

SPLITS = ("train", "validation", "test")


class _Known:
    """The ids have been compared in a pass before."""

    def setdefault(self, name: str, place: str) -> str:
        return place


@dataclass
class PairStream:
    """The pairs of `data.train`, `data.validation` and `data.test`, as far as they are given.

    Every pass raises UserError at the first record that is wrong, with its file and line.
    """

    data: DataConfig
    num_pairs: dict[str, int] = field(default_factory=dict)  # of each split, known after a pass over the texts

    def pairs(self, split: str, places: Places | None = None) -> Iterator[PairRecord]:
        """The pairs of a split.

        Args:
            places: where to note ids, to refuse one that comes twice; without it that is not checked.
        """
        return stream_pairs(getattr(self.data, split), self.data, f"data.{split}", places or _Known())

    def texts(self, check_ids: bool = False) -> Iterator[str]:
        """First and second text of every pair of every split, repeated ones too."""
        for split in SPLITS:
            if split == "train" or getattr(self.data, split) is not None:
                number = 0
                with KeyTable() if check_ids else nullcontext() as ids:
                    for pair in self.pairs(split, ids):
                        number += 1
                        yield pair.text_a
                        yield pair.text_b
                self.num_pairs[split] = number
