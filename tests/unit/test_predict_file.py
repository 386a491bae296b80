"""The verb `predict` on files: records in their order, formats, mistakes found early, a bounded memory."""

import csv
import json
import sys
import tracemalloc

import pyarrow.parquet as pq
import pytest
from matchers import MadeUpEncoder, MadeUpMatcher, made_up_score

from flipkd_dist import cli, predict_file
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import read_records, write_records
from flipkd_dist.token_batches import WINDOW_CHARACTERS, WINDOW_PAIRS, BatchLimits


@pytest.fixture
def matchers(monkeypatch, tmp_path):
    """The matchers that were made; an adapter folder `adapter` is there."""
    made = []
    monkeypatch.setattr(predict_file, "saved_encoder", lambda *_: MadeUpEncoder())
    monkeypatch.setattr(predict_file, "Matcher", lambda *given: made.append(MadeUpMatcher(*given)) or made[-1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "flipkd.json").write_text("{}")
    return made


def write_jsonl(path, records):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def pairs(count):
    return ({"id": n, "text_a": f"query {n // 3}", "text_b": f"text {n}"} for n in range(count))


def run(source, output, **options):
    return predict_file.predict_file("adapter", source, output, "text_a", "text_b", **options)


def answered(record):
    p_match, similarity = made_up_score((record["text_a"].strip(), record["text_b"].strip()))
    return {**record, "p_match": p_match, "similarity": similarity, "match": int(p_match >= 0.5)}


def test_records_come_back_in_their_order_over_all_windows(matchers, tmp_path):
    records = list(pairs(2 * WINDOW_PAIRS + 10))
    records[7] |= {"text_a": "  kärte 丢失 \U0001f4b3 ", "extra": {"nested": [1, None]}}
    records[-1]["p_match"] = "of the input"  # replaced, as always
    source, output = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    assert run(source, output, limits=BatchLimits(99, 3)) == len(records)
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert found == [answered(record) for record in records]
    assert matchers[0].calls == [WINDOW_PAIRS, WINDOW_PAIRS, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_delimited_output_has_the_columns_of_all_records(matchers, tmp_path, extension):
    records = list(pairs(WINDOW_PAIRS + 5))
    records[-1]["late"] = 'a "quoted"\ttext, with delimiters\nand lines'
    source, output = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / f"out.{extension}"
    run(source, output)
    with output.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t" if extension == "tsv" else ","))
    assert list(found[0]) == ["id", "text_a", "text_b", "p_match", "similarity", "match", "late"]
    assert found[0]["late"] == "" and found[-1]["late"] == records[-1]["late"]
    assert [float(row["p_match"]) for row in found] == [answered(record)["p_match"] for record in records]


def test_parquet_keeps_the_types_of_columns(matchers, tmp_path, monkeypatch):
    monkeypatch.setattr("flipkd_dist.record_writer.ROWS_PER_GROUP", 3)
    records = [{**one, "number": None, "tags": []} for one in pairs(10)]
    records[5] |= {"number": 3, "tags": ["a"], "meta": {"x": 1}}
    records[9] |= {"number": 2.5, "meta": {"x": 2, "y": "late"}}
    source, output = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out.parquet"
    run(source, output)
    schema = {field.name: str(field.type) for field in pq.read_schema(output)}
    assert schema["id"] == "int64" and schema["number"] == "double" and schema["p_match"] == "double"
    assert schema["tags"].startswith("list<") and schema["match"] == "int64"
    found = pq.read_table(output).to_pylist()
    assert found[5]["number"] == 3 and found[5]["tags"] == ["a"] and found[9]["meta"] == {"x": 2, "y": "late"}
    assert [row["p_match"] for row in found] == [answered(record)["p_match"] for record in records]
    again = tmp_path / "again.parquet"
    run(output, again)  # Parquet in, Parquet out
    assert pq.read_table(again).equals(pq.read_table(output))


def test_mixed_types_are_refused_for_parquet_alone(matchers, tmp_path):
    records = list(pairs(3))
    records[2]["id"] = "three"
    source = write_jsonl(tmp_path / "in.jsonl", records)
    with pytest.raises(UserError, match=r"Parquet cannot hold a column .*'three'.*: give its values one type or"):
        run(source, tmp_path / "out.parquet")
    assert not matchers
    run(source, tmp_path / "out.jsonl")


UNWRITABLE = {
    "no fields": ({"meta": {}}, {}, "no child field"),
    "no fields in a list": ({"meta": [{}]}, {"meta": []}, "no child field"),
    "float64 does not hold it": ({"number": 2**53 + 1}, {"number": 0.5}, "9007199254740993"),
    "float64 did not hold it": ({"number": 0.5}, {"number": 2**53 + 1}, "9007199254740993"),
    "int64 does not hold it": ({"number": 2**70}, {}, "too large"),
}


@pytest.mark.parametrize("mistake", UNWRITABLE)
@pytest.mark.parametrize("rows_per_group", [3, 10])
def test_what_parquet_cannot_hold_is_told_before_the_model_is_loaded(
    matchers, tmp_path, monkeypatch, mistake, rows_per_group
):
    monkeypatch.setattr("flipkd_dist.record_writer.ROWS_PER_GROUP", rows_per_group)
    first, last, reason = UNWRITABLE[mistake]
    records = list(pairs(10))
    records[0] |= first
    records[-1] |= last
    source = write_jsonl(tmp_path / "in.jsonl", records)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"Parquet cannot hold .*{reason}.* or write JSONL"):
        run(source, tmp_path / "out.parquet")
    assert not matchers and sorted(tmp_path.iterdir()) == before
    run(source, tmp_path / "out.jsonl")


def test_whole_numbers_beside_fractions_are_kept_where_they_fit(matchers, tmp_path, monkeypatch):
    monkeypatch.setattr("flipkd_dist.record_writer.ROWS_PER_GROUP", 3)
    numbers = [2**53, *range(8), 0.5]
    records = [{**one, "number": number} for one, number in zip(pairs(10), numbers, strict=True)]
    run(write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["number"].to_pylist() == numbers


def test_a_list_that_parquet_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="no child field"):
        write_records({tmp_path / "out.parquet": [{"meta": {}}]})
    with pytest.raises(UserError, match="Parquet cannot hold"):
        write_records({tmp_path / "out.parquet": iter([{"label": "x"}])}, ["label"])
    assert not sorted(tmp_path.iterdir())


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_a_text_without_tokens_is_told_with_its_place(matchers, tmp_path, extension):
    records = list(pairs(2 * WINDOW_PAIRS))
    records[-3]["text_b"] = " \ufffd"
    source = write_jsonl(tmp_path / "in.jsonl", records)
    if extension == "parquet":
        source = tmp_path / "in.parquet"
        write_records({source: records})
    before = sorted(tmp_path.iterdir())
    where = "in.jsonl:8190" if extension == "jsonl" else "in.parquet row 8190"
    with pytest.raises(UserError, match=f"{where}: the student's tokenizer turns '\ufffd' into no tokens: correct"):
        run(source, tmp_path / "out.jsonl")
    assert not matchers and sorted(tmp_path.iterdir()) == before


def test_other_columns_count_for_a_window(matchers, tmp_path):
    body = "x" * (WINDOW_CHARACTERS // 10)
    nested = [{"body": body}, {"meta": {"deep": [body]}}]
    records = [{**one, **nested[number % 2]} for number, one in enumerate(pairs(30))]
    run(write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    assert matchers[0].calls == [9, 9, 9, 3]


def test_few_rows_of_a_parquet_file_are_objects_at_a_time(tmp_path):
    """pyarrow's own batches have 65,536 rows, each with all of its lists."""
    lists = [{"text_a": "a", "candidates": [f"candidate {n}" * 3 for n in range(50)]}] * 2000
    write_records({tmp_path / "in.parquet": lists})
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(tmp_path / "in.parquet")) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2**20  # all of them are 10 MiB
    finally:
        tracemalloc.stop()


def test_half_of_a_surrogate_pair_in_another_column(matchers, tmp_path):
    """JSON can escape what UTF-8 cannot hold; found after the scoring, it would be too late."""
    (tmp_path / "in.jsonl").write_text(
        '{"text_a": "a", "text_b": "\u00fc", "note": "\\ud83d \u00fc"}\n', encoding="utf-8"
    )
    run("in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["note"] == "\ud83d \u00fc"
    with pytest.raises(UserError, match="surrogate pair: correct"):
        run("in.jsonl", tmp_path / "out.parquet")
    assert len(matchers) == 1


def test_a_mistake_far_down_is_told_before_the_model_is_loaded(matchers, tmp_path, monkeypatch, capsys):
    records = list(pairs(2 * WINDOW_PAIRS))
    records[-3]["text_b"] = "  "
    write_jsonl(tmp_path / "in.jsonl", records)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["flipkd", "predict", "adapter", "--input", "in.jsonl", "--output", "out.csv"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    where = f"in.jsonl:{2 * WINDOW_PAIRS - 2}: text_b is empty: fill it in or remove the record"
    assert capsys.readouterr().err == f"flipkd: {where}\n"
    assert not matchers and sorted(tmp_path.iterdir()) == before


def test_nothing_stays_of_a_prediction_that_failed(matchers, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", pairs(2 * WINDOW_PAIRS))
    (tmp_path / "out.jsonl").write_text("from before")
    before = sorted(tmp_path.iterdir())
    score = MadeUpMatcher.scores

    def fail(self, texts, *more):
        if self.calls:
            assert len(sorted(tmp_path.iterdir())) == len(before) + 1  # the draft is being written
            raise RuntimeError("out of memory")
        return score(self, texts, *more)

    monkeypatch.setattr(MadeUpMatcher, "scores", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(source, tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "out.jsonl").read_text() == "from before"


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_ten_times_the_pairs_take_the_same_memory(matchers, tmp_path, monkeypatch, extension):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 500)
    monkeypatch.setattr("flipkd_dist.record_writer.ROWS_PER_GROUP", 500)

    def peak(count):
        source = write_jsonl(tmp_path / "in.jsonl", pairs(count))
        tracemalloc.start()
        try:
            run(source, tmp_path / f"out.{extension}")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1500), peak(15_000)
    # Held whole, the records of ten times the pairs take ten times the memory.
    assert large < 1.5 * small
