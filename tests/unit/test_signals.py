"""The teacher's similarities by blocks of columns."""

import numpy as np
from tiny import ArrayReader, unit_vectors

from flipkd_dist.signals import COLUMNS, TextTeacher


class CountingReader(ArrayReader):
    """Remembers how many rows were asked for at once."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.asked = []

    def at(self, rows):
        self.asked.append(len(rows))
        return super().at(rows)


def test_many_columns_are_looked_up_in_blocks_and_each_entry_is_its_cosine():
    vectors, random = unit_vectors(300), np.random.default_rng(0)
    reader = CountingReader(vectors)
    rows, columns = random.integers(300, size=7), random.integers(300, size=2 * COLUMNS + 5)
    found = TextTeacher(reader).matrix(rows, columns)
    np.testing.assert_allclose(found, vectors[rows] @ vectors[columns].T, rtol=1e-6)
    assert reader.asked == [7, COLUMNS, COLUMNS, 5] and found.dtype == np.float32


def test_a_matrix_without_rows_or_columns():
    teacher, none = TextTeacher(ArrayReader(unit_vectors(3))), np.empty(0, np.int64)
    assert teacher.matrix(none, np.arange(3)).shape == (0, 3) and teacher.matrix(np.arange(3), none).shape == (3, 0)
