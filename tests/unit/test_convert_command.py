"""The verb `convert`: round trips of awkward texts, what is lost is said, random non-matches, whole output or none."""

import json

import pytest
from click.testing import CliRunner

from flipkd_dist.cli import cli
from flipkd_dist.config import DataConfig
from flipkd_dist.convert_command import convert
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import read_records, write_records
from flipkd_dist.pair_formats import pair_records

NASTY = [
    "a \"quoted\" text, with commas; and 'more'",
    "tab\there",
    "two\nlines\r\nand\rthree",
    "我的卡在哪里",
    "🙂 👩‍👩‍👧 é é",
    "\0 within \0",
    "x" * 200_000,
    "=1+1\\N\\t{}[]",
    "line\u2028separator\x85next\x0blone\rreturn",
    '"',
]
# A ring: every text is a first and a second text, with a match and a non-match each.
PAIRS = [
    {"text_a": text, "text_b": NASTY[(k + step) % len(NASTY)], "label": label}
    for k, text in enumerate(NASTY)
    for step, label in ((1, 1), (2, 0), (3, 0))
]
SCORED = [pair | {"score": 0.75 + k / 1e3 if pair["label"] else k / 997} for k, pair in enumerate(PAIRS)]
FILES = {  # target, extension, --from
    "flagembedding": (["jsonl", "json", "parquet"], "flagembedding"),
    "tevatron": (["jsonl", "parquet"], "tevatron"),
    "sentence_transformers": (["jsonl", "csv", "tsv", "parquet"], "sentence_transformers"),
    "triplets": (["jsonl", "csv", "tsv", "parquet"], "sentence_transformers"),
    "mteb": (["jsonl", "csv", "tsv", "parquet"], "mteb"),
    "pairs": (["jsonl", "csv", "tsv", "parquet"], "pairs"),
}
CASES = [(target, extension, source) for target, (extensions, source) in FILES.items() for extension in extensions]


def save(path, records):
    write_records({path: records})
    return str(path)


def pair_set(path, format="auto", *more):
    """Every pair of a file; none stands twice."""
    found = [
        tuple(record.get(key) for key in ("text_a", "text_b", "label", *more))
        for _, record, _ in pair_records(path, DataConfig(format=format))
    ]
    assert len(found) == len(set(found))
    return set(found)


def raw(path):
    return [record for _, record in read_records(path)]


@pytest.mark.parametrize("target, extension, source", CASES)
def test_awkward_texts_survive_the_round_trip(tmp_path, target, extension, source):
    given = save(tmp_path / "given.jsonl", PAIRS)
    there, back = tmp_path / f"there.{extension}", tmp_path / "back.jsonl"
    summary = convert(given, str(there), target)
    assert summary["pairs"] == 30 and summary["matches"] == 10 and summary["left_out"] == []
    assert convert(str(there), str(back), "pairs")["read_as"] == source  # known by its look
    assert pair_set(back) == pair_set(given)
    assert pair_set(there, "auto" if source == "pairs" else source) == pair_set(given)  # as data.format reads it
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["given.jsonl", there.name, "back.jsonl"])


def test_awkward_texts_survive_beir(tmp_path):
    given = save(tmp_path / "given.jsonl", PAIRS)
    convert(given, f"{tmp_path}/set:dev", "beir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.jsonl", "set"]
    assert (tmp_path / "set/qrels/dev.tsv").read_text().count("\n") == 31
    assert len(raw(tmp_path / "set/corpus.jsonl")) == len(raw(tmp_path / "set/queries.jsonl")) == 10
    assert convert(f"{tmp_path}/set", f"{tmp_path}/back.jsonl", "pairs")["read_as"] == "beir"
    assert pair_set(tmp_path / "back.jsonl") == pair_set(given)


def test_surrounding_whitespace_is_no_part_of_a_text(tmp_path):
    given = save(tmp_path / "given.jsonl", [{"text_a": " a\t", "text_b": "\u3000b\n", "label": 1}])
    convert(given, f"{tmp_path}/out.jsonl", "flagembedding")
    assert raw(tmp_path / "out.jsonl") == [{"query": "a", "pos": ["b"], "neg": []}]


@pytest.mark.parametrize("target, extension", [("flagembedding", "jsonl"), ("flagembedding", "parquet")])
@pytest.mark.parametrize("logits", [False, True])
def test_flagembedding_keeps_scores(tmp_path, target, extension, logits):
    scored = [pair | {"score": pair["score"] * 17 - 9} for pair in SCORED] if logits else SCORED
    given = save(tmp_path / "given.parquet", scored)
    assert convert(given, f"{tmp_path}/there.{extension}", target)["left_out"] == []
    convert(f"{tmp_path}/there.{extension}", f"{tmp_path}/back.csv", "pairs")
    assert pair_set(tmp_path / "back.csv", "auto", "score") == pair_set(given, "auto", "score")


def test_sentence_transformers_keeps_scores_that_agree_with_the_labels(tmp_path):
    given = save(tmp_path / "given.jsonl", SCORED)
    assert convert(given, f"{tmp_path}/s.csv", "sentence_transformers")["left_out"] == []
    assert list(raw(tmp_path / "s.csv")[0]) == ["sentence1", "sentence2", "score"]
    assert pair_set(tmp_path / "s.csv", "sentence_transformers", "score") == pair_set(given, "auto", "score")
    for name, change in {"other side": 0.4, "logit": 3.0}.items():
        given = save(tmp_path / "given.jsonl", [SCORED[0] | {"score": change}, *SCORED[1:]])
        left = convert(given, f"{tmp_path}/s.jsonl", "sentence_transformers")["left_out"]
        assert left == ["columns that sentence_transformers cannot hold here: score"], name
        assert list(raw(tmp_path / "s.jsonl")[0]) == ["sentence1", "sentence2", "label"]


def test_scores_of_some_pairs_alone_are_said_to_be_lost(tmp_path):
    given = save(tmp_path / "given.jsonl", [SCORED[0], *PAIRS[1:]])
    assert convert(given, f"{tmp_path}/f.jsonl", "flagembedding")["left_out"] == [
        "columns that flagembedding cannot hold here: score"
    ]


def test_what_is_lost_is_said(tmp_path):
    full = [
        {"id": "1", "text_a": "a", "text_b": "b", "label": 1, "group_a": "g", "group_b": "h", "kind": "k", "note": 1},
        {"id": "2", "text_a": "a", "text_b": "c", "label": 0, "group_a": "g", "group_b": "g"},
        {"id": "3", "text_a": "a", "text_b": "b", "label": 1},
        {"id": "4", "text_a": "x", "text_b": "c", "label": 0},
    ]
    given = save(tmp_path / "given.jsonl", full)

    def left(target, output):
        found = convert(given, f"{tmp_path}/{output}", target)["left_out"]
        assert found[0] == "fields not read: note"
        return found[1:]

    columns = "columns that {} cannot hold here: id, group_a, group_b, kind"
    assert left("triplets", "t.csv")[1:] == ["1 pairs left out: their first text has only matches or only non-matches"]
    assert left("beir", "b") == [columns.format("beir"), "1 pairs left out: the same two texts stand earlier"]
    unmatched = "1 queries written without a match: scoring tools take them, trainers do not"
    assert left("flagembedding", "f.jsonl") == [columns.format("flagembedding"), unmatched]
    assert left("tevatron", "v.jsonl")[1] == "1 queries written without a match, which Tevatron's trainer needs"
    assert left("faq", "q.csv") == [
        "columns that faq cannot hold here: id, kind",
        "2 labels lost: the groups of the two texts say otherwise",
        "2 pairs left out: a text of theirs has no group",
    ]
    assert [tuple(row.values()) for row in raw(tmp_path / "q.csv")] == [("a", "g"), ("b", "h"), ("c", "g")]
    assert left("pairs", "p.csv") == []
    assert [*raw(tmp_path / "p.csv")[0]] == ["id", "text_a", "text_b", "label", "group_a", "group_b", "kind"]


def test_first_texts_keep_the_order_of_their_first_appearance(tmp_path):
    rows = [("b", "1", 1), ("a", "1", 0), ("b", "2", 0), ("a", "2", 1), ("b", "3", 1)]
    given = save(tmp_path / "p.jsonl", [dict(zip(("text_a", "text_b", "label"), row, strict=True)) for row in rows])
    convert(given, f"{tmp_path}/f.jsonl", "flagembedding")
    assert raw(tmp_path / "f.jsonl") == [
        {"query": "b", "pos": ["1", "3"], "neg": ["2"]},
        {"query": "a", "pos": ["2"], "neg": ["1"]},
    ]


def test_ids_of_texts_travel(tmp_path):
    passage = [{"docid": "d1", "title": "", "text": "p"}, {"docid": "d2", "title": "", "text": "n"}]
    row = {"query_id": "q7", "query": "q", "positive_passages": passage[:1], "negative_passages": passage[1:]}
    given = save(tmp_path / "t.jsonl", [row, row | {"query_id": "q8", "query": "other"}])
    convert(given, f"{tmp_path}/beir", "beir")
    judged = "query-id\tcorpus-id\tscore\nq7\td1\t1\nq7\td2\t0\nq8\td1\t1\nq8\td2\t0\n"
    assert (tmp_path / "beir/qrels/test.tsv").read_text() == judged
    convert(f"{tmp_path}/beir", f"{tmp_path}/back.jsonl", "tevatron")
    assert raw(tmp_path / "back.jsonl") == raw(given)


def test_one_id_for_two_texts_is_not_believed(tmp_path):
    rows = [{"text_a": "a", "text_b": text, "label": 1, "id_a": "q", "id_b": "d"} for text in ("one", "two", "one")]
    convert(save(tmp_path / "p.jsonl", rows), f"{tmp_path}/beir", "beir")
    assert [row["text"] for row in raw(tmp_path / "beir/corpus.jsonl")] == ["one", "two"]
    assert {pair[:2] for pair in pair_set(tmp_path / "beir", "beir")} == {("a", "one"), ("a", "two")}


def test_faq_becomes_pairs_by_the_seed(tmp_path):
    rows = [{"text": f"question {n} of {n % 4}", "group": n % 4} for n in range(20)]
    given = save(tmp_path / "faq.csv", rows)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert convert(given, f"{tmp_path}/{name}.jsonl", "pairs", seed=seed)["read_as"] == "faq"
    one, same, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    convert(f"{tmp_path}/one.jsonl", f"{tmp_path}/back.csv", "faq")
    assert {(row["text"], int(row["group"])) for row in raw(tmp_path / "back.csv")} == {
        (row["text"], row["group"]) for row in rows
    }


@pytest.fixture
def matches_alone(tmp_path):
    """A BEIR folder of 5 queries with 2 matches each among 40 documents, one of which has no text."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_records({folder / "corpus.jsonl": [{"_id": f"d{n}", "text": f"text {n}" if n else ""} for n in range(40)]})
    write_records({folder / "queries.jsonl": [{"_id": f"q{n}", "text": f"query {n}"} for n in range(5)]})
    rows = "".join(f"q{n}\td{2 * n + k}\t1\n" for n in range(5) for k in (1, 2))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return str(folder)


def test_random_non_matches(tmp_path, matches_alone):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        summary = convert(matches_alone, f"{tmp_path}/{name}.jsonl", "pairs", negatives=4, seed=seed)
        assert (summary["matches"], summary["non_matches"], summary["left_out"]) == (10, 40, [])
    one, same, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    found = pair_set(tmp_path / "one.jsonl", "auto", "id_a", "id_b", "kind")  # no pair twice
    known = {(a, b) for a, b, label, *_ in found if label}
    drawn = {(a, b) for a, b, label, *_ in found if not label}
    assert len(known) == 10 and not known & drawn and {kind for *_, label, _, _, kind in found} == {None, "random"}
    assert all(id_a and f"text {id_b[1:]}" == b for _, b, _, id_a, id_b, _ in found)
    assert len({b for _, b in drawn}) > 20  # from the whole corpus, not from the judged documents alone


@pytest.fixture
def graded(tmp_path):
    """A BEIR folder like NFCorpus: titles, judgements 0, 1 and 2, questions of their own in each split."""
    folder = tmp_path / "graded"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": f"title {n}", "text": f"text {n}"} for n in range(30)]
    write_records({folder / "corpus.jsonl": corpus})
    write_records({folder / "queries.jsonl": [{"_id": f"q{n}", "text": f"question {n}"} for n in range(4)]})
    for split, queries in (("train", (0, 1)), ("test", (2, 3))):
        rows = [(query, document, (query + document) % 3) for query in queries for document in range(6)]
        lines = "".join(f"q{query}\td{document}\t{score}\n" for query, document, score in rows)
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return str(folder)


@pytest.mark.parametrize(("least", "matching"), [(None, {1, 2}), (1, {1, 2}), (2, {2}), (1.5, {2})])
def test_judgements_become_labels_and_no_judged_document_is_drawn(tmp_path, graded, least, matching):
    questions = {}
    for split in ("train", "test"):
        output = tmp_path / f"{split}.jsonl"
        convert(f"{graded}:{split}", str(output), "pairs", negatives=3, min_relevance=least)
        found = [record for _, record in read_records(output)]
        judged = [record for record in found if "kind" not in record]
        drawn = [record for record in found if record.get("kind") == "random"]
        assert len(judged) == 12 and len(judged) + len(drawn) == len(found)
        for record in judged:
            query, document = int(record["id_a"][1:]), int(record["id_b"][1:])
            assert record["label"] == ((query + document) % 3 in matching)
            assert record["text_b"] == f"title {document} text {document}"
        assert len(drawn) == 3 * sum(record["label"] for record in judged) > 0
        assert all(record["label"] == 0 and int(record["id_b"][1:]) >= 6 for record in drawn)
        assert {record["text_a"] for record in drawn} <= {record["text_a"] for record in judged}
        questions[split] = {record["text_a"] for record in found}
    assert not questions["train"] & questions["test"]


def test_only_judgements_have_a_relevance(tmp_path):
    given = save(tmp_path / "p.jsonl", PAIRS)
    with pytest.raises(
        UserError, match=r"--min-relevance: .* is read as pairs, only beir has judgements: leave it out"
    ):
        convert(given, f"{tmp_path}/out.jsonl", "pairs", min_relevance=2)


def test_few_texts_give_few_non_matches_and_it_is_said(tmp_path):
    rows = [
        ("a", "x", 1, "g", "g"),
        ("a", "y", 1, "g", "g"),
        ("b", "z", 1, "h", "h"),
        ("b", "b", 1, "h", "h"),
        ("y", "z", 0, "", ""),
        ("z", "q", 1, "", ""),
    ]
    names = ("text_a", "text_b", "label", "group_a", "group_b")
    given = save(tmp_path / "p.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    summary = convert(given, f"{tmp_path}/out.jsonl", "pairs", negatives=3)
    made = {record[:2] for record in pair_set(tmp_path / "out.jsonl", "auto", "kind") if record[3] == "random"}
    # Of the pool x, y, z, b, q: neither what is labelled in either order (y with z, z with b) nor z with itself.
    assert made == {("a", "z"), ("a", "b"), ("a", "q"), ("b", "x"), ("b", "y"), ("b", "q"), ("z", "x")}
    assert summary["left_out"] == ["8 non-matches not made: too few texts to draw from"]


def test_texts_of_one_group_are_no_non_matches(tmp_path):
    groups = {"a": "g", "x": "g", "y": "g", "b": "h", "z": "h"}
    rows = [("a", "x", 1), ("b", "z", 1), ("b", "x", 0), ("x", "y", 1)]
    named = [
        {"text_a": a, "text_b": b, "label": label, "group_a": groups[a], "group_b": groups[b]} for a, b, label in rows
    ]
    convert(save(tmp_path / "p.jsonl", named), f"{tmp_path}/out.jsonl", "pairs", negatives=3)
    made = {record[:2] for record in pair_set(tmp_path / "out.jsonl", "auto", "kind") if record[3] == "random"}
    assert made == {("a", "z"), ("b", "y"), ("x", "z")}


MISTAKES = {
    "no such file": ("no.jsonl", "out.csv", "pairs", {}, "no.jsonl: no such file"),
    "unknown look": ("odd.jsonl", "out.csv", "pairs", {}, r"columns of no known format \(x, y\): name it with --from"),
    "wrong --from": ("p.jsonl", "out.csv", "pairs", {"source_format": "tevatron"}, "p.jsonl:1: no column query; "),
    "wrong pairs": ("f.jsonl", "out.csv", "pairs", {"source_format": "pairs"}, "set --from to flagembedding"),
    "late mistake": ("late.jsonl", "out.csv", "mteb", {}, r"late.jsonl:31: label is 2: write 0 or 1"),
    "nothing in it": ("empty.jsonl", "out.csv", "pairs", {"source_format": "pairs"}, "empty.jsonl: no pairs in it"),
    "nothing to see": ("empty.jsonl", "out.csv", "pairs", {}, r"columns of no known format \(none\)"),
    "nested in CSV": ("p.jsonl", "out.csv", "flagembedding", {}, "holds lists in a record: name a .jsonl or .parquet"),
    "extension": ("p.jsonl", "out.txt", "mteb", {}, "out.txt: unknown extension"),
    "no folder": ("p.jsonl", "no/out.csv", "mteb", {}, "there is no folder"),
    "itself": ("p.jsonl", "p.jsonl", "mteb", {}, "this is the input: name another"),
    "beir in the way": ("p.jsonl", "full", "beir", {}, "full: this exists: name a new folder"),
    "beir without parent": ("p.jsonl", "no/beir", "beir", {}, "there is no folder .*no: create it"),
    "triplets of matches": ("one.jsonl", "out.csv", "triplets", {}, "no non-match in it.*--negatives"),
    "triplets of none": ("none.jsonl", "out.csv", "triplets", {}, "no match in it, and triplets need one"),
    "triplets without both labels for one text": (
        "apart.jsonl",
        "out.csv",
        "triplets",
        {},
        "apart.jsonl as triplets: no",
    ),
    "faq without groups": ("p.jsonl", "out.csv", "faq", {}, "no group_a and group_b in it"),
    "faq column": (
        "p.jsonl",
        "out.csv",
        "pairs",
        {"source_format": "faq"},
        "no column group; .*: correct the file or use flipkd pairs --group",
    ),
    "which split": ("beir", "out.csv", "pairs", {}, "no split 'dev'|no .*queries.jsonl"),
}


@pytest.mark.parametrize("source, output, target, more, what", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_write_nothing(tmp_path, source, output, target, more, what):
    save(tmp_path / "p.jsonl", PAIRS)
    save(tmp_path / "late.jsonl", [*PAIRS, {"text_a": "a", "text_b": "b", "label": 2}])
    save(tmp_path / "f.jsonl", [{"query": "q", "pos": ["p"]}])
    save(tmp_path / "odd.jsonl", [{"x": 1, "y": 2}])
    save(tmp_path / "one.jsonl", PAIRS[:1])
    save(tmp_path / "none.jsonl", PAIRS[1:2])
    save(tmp_path / "empty.jsonl", [])
    save(tmp_path / "apart.jsonl", [PAIRS[0], PAIRS[4]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir/corpus.jsonl").touch()
    (tmp_path / "out.csv").write_text("before")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=what) as caught:
        convert(f"{tmp_path}/{source}", f"{tmp_path}/{output}", target, **more)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("target", ["mteb", "beir"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, target):
    given = save(tmp_path / "p.jsonl", PAIRS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flipkd_dist.beir_writer._named", full)
    monkeypatch.setattr("csv.DictWriter.writerows", full)
    with pytest.raises(UserError, match=r"out(\.csv)?: cannot be written \(No space left on device\): check folder"):
        convert(given, f"{tmp_path}/out" + (".csv" if target == "mteb" else ""), target)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_the_command_line(tmp_path, caplog):
    given = save(tmp_path / "p.jsonl", SCORED)
    caplog.set_level("INFO", "flipkd_dist")
    arguments = ["convert", given, "--output", f"{tmp_path}/t.csv", "--to", "triplets", "--from", "pairs"]
    assert CliRunner().invoke(cli, [*arguments, "--negatives", "1", "--seed", "5"]).exit_code == 0
    assert "read_as pairs, pairs 40, matches 10, non_matches 30" in caplog.text
    assert "columns that triplets cannot hold here: kind, score" in caplog.text
    assert json.dumps(raw(tmp_path / "t.csv")).count('"anchor"') == 30
