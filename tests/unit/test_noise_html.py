"""The page stands alone, renders equal reports equally, and shows any text as text."""

import re
import warnings

import numpy as np
import pytest
from html_page import Page
from noise_cases import HOSTILE, LABELLED, OFF_DIAGONAL, degenerate_cases, hostile_pairs

from flipkd_dist.noise_html import html, write_html
from flipkd_dist.noise_plots import plots
from flipkd_dist.noise_report import noise_report
from flipkd_dist.page import SHOWN
from flipkd_dist.plot_svg import COLOURS

FACTS = {"teacher": "<b>encoder</b>", "fingerprint": "0123abcd"}


@pytest.fixture(scope="module")
def page():
    return html(noise_report(*LABELLED, OFF_DIAGONAL, 0.4, hostile_pairs(), FACTS))


def test_the_page_stands_alone(page):
    found = Page(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "b"}
    assert "svg" in found.tags and "style" in found.tags
    references = [value for _, name, value in found.attributes if name in ("href", "xlink:href", "src")]
    assert references and all(value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!#)|http-equiv=.refresh", page)
    addresses = {value for _, name, value in found.attributes if "//" in (value or "")}
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_texts_are_shown_as_texts(page):
    text = "".join(Page(page).texts)
    assert HOSTILE[0] in text and HOSTILE[1] in text and HOSTILE[3] in text and "<b>encoder</b>" in text
    assert "x" * SHOWN + " …" in text and "x" * (SHOWN + 1) not in text
    assert "bell \ufffd escape \ufffd[31m red \ufffd lone \ufffd surrogate\nsecond line" in text
    assert page.count('<p dir="auto">') == 12


def test_what_the_page_says(page):
    text = " ".join(" ".join(Page(page).texts).split())
    assert "ROC-AUC 0.719" in text and "agreement at 0.5 62.5%" in text and "75.0% at 0.800" in text
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)[1:]]
    assert [row[0] for row in rows] == ["off", *(f"0.{tenth}" for tenth in range(1, 10))]
    assert {row[0]: row[-1] for row in rows if row[-1]} == {"0.4": "configured", "0.5": "suggested"}
    assert rows[5][:6] == ["0.5", "75.0%", "50.0%", "80.0%", "100.0%", "80.0%"]  # of those kept, 0.5 lies below 0.8
    assert "The 6 most contradictory pairs" in text and "file:3" in text


def test_equal_reports_give_equal_pages(page):
    assert html(noise_report(*LABELLED, OFF_DIAGONAL, 0.4, hostile_pairs(), FACTS)) == page


def test_plots_take_the_colours_of_the_page():
    drawn = plots(noise_report(*LABELLED, OFF_DIAGONAL, 0.4))
    assert set(drawn) == {"distributions", "roc", "kept"}
    for svg in drawn.values():
        assert svg.startswith("<svg ") and svg.endswith("</svg>")
        assert "<metadata" not in svg and "<style" not in svg  # no date, no style for the whole page
        assert not any(colour in svg for colour in COLOURS) and "var(--ink)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


@pytest.mark.parametrize("name, similarity, label, off_diagonal, theta", degenerate_cases())
def test_every_case_has_a_page(name, similarity, label, off_diagonal, theta):
    with warnings.catch_warnings(action="error"):
        text = " ".join(Page(html(noise_report(similarity, label, off_diagonal, theta))).texts)
    assert not re.search(r"\b(nan|inf|None)\b", text)
    is_empty = name in ("no pairs", "nothing finite")
    assert ("There is no pair to report on" in text) == is_empty
    assert ("of one class" in text) == (
        name in ("positives alone", "negatives alone", "off-diagonal alone", "one pair")
    )


def test_the_page_is_written_whole_by_rename(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    found = noise_report(*LABELLED, OFF_DIAGONAL, 0.5, hostile_pairs())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_html(found, path)
    assert path.read_text() == "old"
    write_html(found, path)
    assert path.read_text(encoding="utf-8") == html(found)


def test_warnings_are_on_the_page():
    text = html(noise_report(np.full(8, 0.99), LABELLED[1], OFF_DIAGONAL, 0.5))
    assert 'class="warning"' in text and "keeps under 5% of labelled negatives" in text
