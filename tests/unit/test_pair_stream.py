"""The stream of pairs is the table of pairs, record for record, and refuses the same in the same words."""

import pytest

from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.pairs import read_pairs

HEADER = "id,text_a,text_b,label"


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in (HEADER, *lines)))
    return str(path)


def test_the_stream_gives_what_the_table_holds(tmp_path):
    train = [
        write(tmp_path / "one.csv", "p1,lost my card,card lost,1", ",open account,close it,0"),
        write(tmp_path / "two.csv", "p3,card lost,money,0"),
    ]
    data = DataConfig(train=train, test=write(tmp_path / "test.csv", "p1,money,cash,1"))
    stream, table = PairStream(data), read_pairs(train, data, "data.train")
    pairs = list(stream.pairs("train"))
    assert [pair.id for pair in pairs] == table.ids == ["p1", "one:3", "p3"]
    assert [(pair.text_a, pair.text_b) for pair in pairs] == [
        (table.texts[a], table.texts[b]) for a, b in zip(table.text_a, table.text_b, strict=True)
    ]
    assert [pair.label for pair in pairs] == table.label.tolist()
    assert list(stream.texts(check_ids=True)) == [
        *("lost my card", "card lost", "open account", "close it", "card lost", "money"),
        *("money", "cash"),  # an id of another split may come again
    ]
    assert stream.num_pairs == {"train": 3, "test": 1}


@pytest.mark.parametrize(
    "lines",
    [
        ("p1,a,b,1", "p2,a,,0"),
        ("p1,a,b,1", "p2,a,b,maybe"),
        ("p1,a,b,1", "p2,a,b,0", "p1,c,d,0", "p9,,,"),
        ("p1,a,b,1", "one too few,a,1"),
        (),
    ],
)
def test_a_mistake_is_told_in_the_same_words(tmp_path, lines):
    data = DataConfig(train=[write(tmp_path / "good.csv", "g1,a,b,1"), write(tmp_path / "bad.csv", *lines)])
    with pytest.raises(UserError) as expected:
        read_pairs(data.train, data, "data.train")
    with pytest.raises(UserError) as told:
        list(PairStream(data).texts(check_ids=True))
    assert str(told.value) == str(expected.value) and str(told.value).startswith("data.train: ")


def test_an_id_of_another_file_is_found_with_its_place(tmp_path):
    data = DataConfig(train=[write(tmp_path / "a.csv", "x,a,b,1", "y,a,b,1"), write(tmp_path / "b.csv", "y,c,d,0")])
    with pytest.raises(UserError, match=r"b\.csv:2: id 'y' stands at .*a\.csv:3 too: make ids unique"):
        list(PairStream(data).texts(check_ids=True))


def test_without_training_pairs(tmp_path):
    data = DataConfig(test=write(tmp_path / "test.csv", "p1,money,cash,1"))
    with pytest.raises(UserError, match=r"data\.train: no pairs are given"):
        list(PairStream(data).texts())
