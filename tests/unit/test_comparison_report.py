"""The report stands alone, shows any text as text, and has a page for whatever is missing."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from noise_cases import HOSTILE
from report_cases import comparison, hostile, pair_table, results

from flipkd_dist import comparison_report
from flipkd_dist.comparison import REFERENCE, Comparison, Results, Row, RowScores
from flipkd_dist.comparison_html import html
from flipkd_dist.comparison_markdown import escaped, markdown
from flipkd_dist.comparison_plots import VARIABLES
from flipkd_dist.comparison_summary import summarise
from flipkd_dist.config import RunConfig
from flipkd_dist.losses import SYMBOLS
from flipkd_dist.page import SHOWN
from flipkd_dist.plot_svg import COLOURS
from flipkd_dist.run_folder import write_json

CONFIG = RunConfig(name="bank", tracking={"mlflow_tracking_uri": "http://me:secret@host/x"})
FAILURES = {"kdmcse": "2 of 5 runs ran out of memory"}


@pytest.fixture(scope="module")
def summary():
    found = comparison()
    return summarise(found, results(found), CONFIG, FAILURES, "2026-01-02 03:04 UTC")


@pytest.fixture(scope="module")
def page(summary):
    return html(summary)


def texts_of(page):
    return " ".join(" ".join(Page(page).texts).split())


def test_the_page_stands_alone(page):
    found = Page(page)
    assert not found.tags & {"script", "link", "img", "image", "iframe", "object", "a"}
    references = [value for _, name, value in found.attributes if name in ("href", "xlink:href", "src")]
    assert references and all(value.startswith("#") for value in references)
    assert not any(name.startswith("on") for _, name, _ in found.attributes)
    assert not re.search(r"@import|url\((?!#)|http-equiv=.refresh", page)
    addresses = {value for _, name, value in found.attributes if "//" in (value or "")}
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert "default-src 'none'" in page and len(page) < 1_000_000


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_plots_take_the_colours_of_the_page(page):
    drawn = {re.match('<svg class="(.*?)"', svg)[1]: svg for svg in re.findall("<svg.*?</svg>", page, re.DOTALL)}
    readings = ("p_match", "similarity")
    curves = {f"{kind}-{reading}" for kind in ("roc", "precision") for reading in readings}
    assert set(drawn) == {"distributions", *curves, "calibration", "sweep-0", "matrices"}
    for svg in drawn.values():
        assert not any(colour in svg for colour in (*COLOURS, *VARIABLES))
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    style = page[: page.index("</style>")]
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert all(style.count(f"--{name}:") == 2 for name in used)  # light and dark


def test_what_the_page_says(page):
    text = texts_of(page)
    assert "the row flip is better than the row lora_sup in ROC-AUC" in text and "there is no difference in" in text
    assert "Note: kdmcse failed: 2 of 5 runs ran out of memory" in text
    for heading in ("Test pairs", "Matches and hard non-matches", "What each row trains on", "Sweep of loss.margin"):
        assert f" {heading} " in text
    assert "The 10 pairs that flip won" in text and "The 10 pairs that flip lost" in text
    assert "12 min 34 s" not in text and "13 min 18 s" in text  # a mean over seeds
    assert "seeds 42, 43, 44, 45, 46" in text and "checkpoints averaged 2" in text and "2026-01-02 03:04 UTC" in text
    assert "test pairs 600 (250 match, 100 hard non-matches)" in text
    assert "L_sup + 0.1 L_dist + 0.1 L_MCL" in text and "FlipKD, Eq 6" in text


def test_the_table_has_a_cell_for_each_metric(page, summary):
    table = re.findall(r'<table class="results">.*?</table>', page, re.DOTALL)
    assert len(table) == len(summary.tables) == 4
    rows = re.findall(r"<tr.*?</tr>", table[0], re.DOTALL)[1:]
    assert len(rows) == 13 and all(row.count("<td") == 4 for row in rows)  # the encoders have no p(match)
    assert [row for row in rows if 'class="marked"' in row] == [row for row in rows if ">lora_sup<" in row]
    flip = next(row for row in rows if ">flip<" in row)
    assert flip.count('<span class="better">better') == 1 and flip.count('"no-difference">no difference') == 2
    assert "p &lt; 0.001" in flip and " ± " in flip


def test_an_encoder_without_runs_is_missed_where_it_could_stand():
    found = comparison(seeds=[1], checkpoints=1, sweep=(), names=("classic", REFERENCE, "flip"))
    found = replace(found, rows=[replace(row, runs=row.runs * (row.row.name != "classic")) for row in found.rows])
    summary = summarise(found, results(found), failures={"classic": "no room"})
    lines = {(table.split, table.reading): [line.name for line in table.lines] for table in summary.tables}
    assert lines["test", "p_match"] == [REFERENCE, "flip"]
    assert lines["test", "similarity"] == ["classic", REFERENCE, "flip"]
    assert summary.tables[1].lines[0].failure == "no room"


def test_passwords_stay_out(page, summary):
    assert "secret" not in page and "secret" not in markdown(summary) and "://host" in page


def test_equal_summaries_give_equal_reports():
    found = [comparison(seeds=[1], checkpoints=1, sweep=(), names=(REFERENCE, "flip")) for _ in range(2)]
    first, again = (summarise(one, results(one), CONFIG, FAILURES) for one in found)
    assert html(first) == html(again) and markdown(first) == markdown(again)


def test_texts_are_shown_as_texts():
    found, failures = hostile()
    summary = summarise(found, results(found), CONFIG, failures)
    page = html(summary)
    parsed = Page(page)
    text = "".join(parsed.texts)
    assert not parsed.tags & {"script", "img"} and "<script>alert('x')</script>" in text and HOSTILE[3] in text
    assert "x" * SHOWN + " …" in text and "x" * (SHOWN + 1) not in text
    assert "bell \ufffd escape \ufffd[31m red \ufffd lone \ufffd surrogate" in text
    assert page.count('<p dir="auto">') == 40
    as_text = markdown(summary)
    assert "<script" not in as_text and "\x00" not in as_text and "\\[link\\](http" in as_text
    assert "x" * (SHOWN + 1) not in as_text
    for table in re.findall(r"(?:^\|.*\n)+", as_text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a|b", "a\\|b"),
        ("- a\n\nb", "\\- a b"),
        ("12. a", "12\\. a"),
        ("# `x` *y* <b> &amp;", "\\# \\`x\\` \\*y\\* &lt;b> &amp;amp;"),
        ("p(match) 0.5", "p(match) 0.5"),
    ],
)
def test_markdown_is_escaped(text, shown):
    assert escaped(text) == shown


def test_the_markdown_holds_the_tables(summary):
    text = markdown(summary)
    assert text.startswith("# Comparison: bank-compare\n\n**By p(match), the row flip is better")
    assert "| the row lora\\_sup (reference) |" in text and "<br>p &lt; 0.001: better" in text
    assert "## Sweep of loss.margin" in text and "| 0.06 |" in text and "| flip | 13 min 18 s |" in text
    assert "## Calibration of p(match)" in text and "## The 10 pairs that flip lost" in text
    assert text.count("\n```") == 2 and "\n\n\n" not in text


def cases():
    """(name, comparison) of whatever a comparison may lack."""
    whole = comparison(seeds=[1], checkpoints=1, sweep=())
    few = comparison(seeds=[1], checkpoints=1, sweep=(), names=(REFERENCE, "flip"))
    flip = few.row("flip")
    plain = {"validation": pair_table(20, 0), "test": pair_table(40, 0)}
    one_class = {"test": pair_table(40, 0, label=np.ones(40, np.int64))}
    constant = replace(flip.runs[0], scores={r: {"test": np.full((1, 600), 0.5)} for r in ("p_match", "similarity")})
    return [
        ("one seed", whole),
        ("reference alone", comparison(seeds=[1, 2], sweep=(), names=(REFERENCE,))),
        ("flip alone", comparison(seeds=[1, 2], sweep=(), names=("flip",))),
        ("teacher alone", comparison(seeds=[1], sweep=(), names=("teacher",))),
        ("no hard pairs, no matrix", comparison(seeds=[1], sweep=(), pairs=plain, names=(REFERENCE, "flip"))),
        ("one class", comparison(seeds=[1], sweep=(), pairs=one_class, names=("teacher", REFERENCE, "flip"))),
        ("failed rows", replace(few, rows=[few.rows[0], replace(flip, runs=[])])),
        ("all failed", replace(few, rows=[replace(row, runs=[]) for row in few.rows])),
        ("constant scores", replace(few, rows=[few.rows[0], replace(flip, runs=[constant])])),
        ("no pairs", Comparison("none", {}, [RowScores(Row("flip", "flip", {}), [])])),
        ("nothing", Comparison("nothing", {}, [])),
    ]


@pytest.mark.parametrize("name, found", cases(), ids=[name for name, _ in cases()])
def test_every_comparison_has_a_report(name, found):
    measured = results(found) if found.pairs else Results([], REFERENCE, 0.01, 0)
    with warnings.catch_warnings(action="error"):
        summary = summarise(found, measured)
        text, as_text = texts_of(html(summary)), markdown(summary)
    for one in (text, as_text):
        assert not re.search(r"\b(nan|inf|None)\b", one)
    assert ("of one class" in text) == (name == "one class")
    assert ("There is no" in text or "there are no test pairs" in text) == (name in ("no pairs", "nothing"))
    assert ("has no run" in text) == (name in ("failed rows", "all failed", "no pairs"))
    assert ("No row has a result" in text) == (name in ("all failed", "no pairs", "nothing"))
    assert ("fewer than 3 seeds" in text) == (name not in ("teacher alone", "nothing"))


def test_the_symbols_of_the_formulas_are_explained():
    summary = summarise(found := comparison(seeds=[42], names=(REFERENCE, "flip"), sweep=()), results(found))
    assert SYMBOLS in texts_of(html(summary)) and SYMBOLS in markdown(summary)


@pytest.mark.parametrize("count, told", [(3, True), (4, True), (5, False)])
def test_few_seeds_are_said_to_show_little(count, told):
    found = comparison(seeds=range(42, 42 + count), names=(REFERENCE, "flip"), sweep=())
    notes = summarise(found, results(found)).notes
    assert any(f"with {count} seeds the t-test can hardly reach" in note for note in notes) == told


def test_the_files_are_written_whole_by_rename(tmp_path, monkeypatch):
    found = comparison(seeds=[1], checkpoints=1, sweep=(), names=(REFERENCE, "flip"))
    (tmp_path / "report.html").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            comparison_report.write(tmp_path, found, results(found))
    assert (tmp_path / "report.html").read_text() == "old"
    comparison_report.write(tmp_path, found, results(found), CONFIG)
    assert texts_of((tmp_path / "report.html").read_text(encoding="utf-8")).startswith("Comparison: bank-compare")
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# Comparison: bank-compare")


def test_settings_and_failures_are_taken_from_the_folder(tmp_path):
    found = comparison(seeds=[1], checkpoints=1, sweep=(0.02,), names=(REFERENCE, "flip", "flip-loss.margin-0.02"))
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    runs = [{"status": "done", "reason": None}, {"status": "failed", "reason": "out of memory"}]
    write_json(
        tmp_path / "comparison.json",
        {
            "rows": [
                {"name": "flip", "kind": "student", "runs": runs},
                {"name": "teacher", "kind": "teacher", "runs": runs},  # whose scores another run holds
                {"name": "x", "kind": "student", "runs": []},
            ]
        },
    )
    comparison_report.write(tmp_path, found, results(found))
    text = texts_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "flip failed: 1 of 2 runs: out of memory" in text and "x failed" not in text and "teacher failed" not in text
    as_text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| 0.02 \|.*\n\| 0.06 \|", as_text, re.MULTILINE) and "name: bank" in as_text
