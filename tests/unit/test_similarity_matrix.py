"""Which pairs are crossed, and that the file gives back what was written."""

import dataclasses

import numpy as np
from tiny import pair_table

from flipkd_dist.comparison import Matrix
from flipkd_dist.comparison_reading import read_matrix
from flipkd_dist.similarity_matrix import SIZE, matrix_pairs, write_matrix


def grouped(labels: list[int], groups: list[int]):
    codes = np.array(groups)
    return dataclasses.replace(pair_table(len(labels)), label=np.array(labels), group_a=codes, group_b=codes)


def test_matching_pairs_of_several_groups_side_by_side():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(2, size=400), generator.integers(20, size=400)
    chosen = matrix_pairs(grouped(labels.tolist(), groups.tolist()))
    assert len(chosen) == len(set(chosen.tolist())) == SIZE and labels[chosen].all()
    found = groups[chosen].tolist()
    assert [found[at] for at in range(0, SIZE, 4)] == list(dict.fromkeys(found)) and len(set(found)) == SIZE // 4
    assert all(found.count(group) == 4 for group in found)


def test_few_groups_fill_the_matrix_and_pairs_without_a_group_stand_alone():
    assert matrix_pairs(grouped([1, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 1])).tolist() == [0, 3, 4, 5, 6, 2, 7]
    assert matrix_pairs(grouped([1] * 40, [-1] * 40)).tolist() == list(range(SIZE))
    assert matrix_pairs(grouped([1] * 40, [3] * 39 + [-1])).tolist() == [*range(SIZE - 1), 39]
    assert matrix_pairs(grouped([0, 0], [1, 1])).shape == (0,)


def test_a_file_gives_back_the_matrix(tmp_path):
    assert read_matrix(tmp_path) is None
    teacher = np.array([[0.5, np.nan], [0.25, 1.0]])
    write_matrix(tmp_path, Matrix([4, 7], teacher, teacher.T - 1))
    found = read_matrix(tmp_path)
    assert found.pairs == [4, 7]
    np.testing.assert_array_equal(found.teacher, teacher)
    np.testing.assert_array_equal(found.student, teacher.T - 1)
