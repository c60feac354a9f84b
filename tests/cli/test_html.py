"""The page says what the reports say, and stands alone."""

import base64
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from pkjax import tables
from pkjax.cli import html
from pkjax.cli.screen import print_reports
from rich.console import Console

from tests.fake_report import report as fake


@pytest.fixture(scope="module")
def page():
    return html.page({"dense": fake(), "pruned <b>": fake(pruned=True)}, title="FC-100 & digits",
                     settings={"model": "fc-100"}, environment={"jax": "0.10"})


def cells(page):
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_page_is_well_formed_and_names_are_escaped(page):
    void = {"meta", "img", "br"}
    stack = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Parser().feed(page)
    assert stack == []
    assert "pruned &lt;b&gt;" in page
    assert "FC-100 &amp; digits" in page


def test_page_loads_nothing_and_holds_six_pictures(page):
    sources = re.findall(r"(?:src|href)=\"?([^\"> ]+)", page)
    assert len(sources) == 6
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data)[:4] == b"\x89PNG"
    assert not re.search(r"https?://|@import|<script|<link", page)


def test_page_shows_claims_as_found(page):
    rows = {row[0]: row[1:] for row in cells(page) if row}
    false = next(value for key, value in rows.items() if key.startswith("per_index"))
    assert false == ["false in general", "holds: 0.75 at i = 4", "fails: 32 at i = 4"]
    true = next(value for key, value in rows.items() if key.startswith("product"))
    assert true[0] == "theorem"
    assert page.count("class=broken") == 1                   # the failed check, not the false claims
    assert page.count("class=fails") == 2
    assert rows["weights kept"] == ["57,400 of 57,400", "5,020 of 57,400"]


def test_indices_stand_below_the_line_and_exponents_do_not_break(page):
    assert tables.formula("λ_{i+j-1} ≤ ν_1 O_ij² & x_s(p)") == \
        "λ<sub>i+j-1</sub> ≤ ν<sub>1</sub> O<sub>ij</sub>² &amp; x<sub>s</sub>(p)"
    assert "_i" not in re.sub(r"<b>.*?</b>|src=\"[^\"]*\"", "", page)
    assert not re.search(r"\de-\d", re.sub(r"<span.*?</td>", "", page.split("Theorem 1")[0]))


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one report"):
        html.page({}, title="", settings={}, environment={})


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_the_page_in_light_and_dark(page, dark):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    light, _, other = style.partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#\w+)", light))
    if dark:
        changed = dict(re.findall(r"--(\w+): (#\w+)", other))
        assert changed.keys() == colours.keys()
        colours = changed

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        channels = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("text", "note", "holds", "fails", "broken"):      # WCAG 2, level AA
        lighter, darker = sorted((luminance(colours[name]), luminance(colours["page"])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


def test_claims_that_reports_word_or_have_differently_are_each_reports_own(capsys):
    """As of a network with frozen gates beside one of ReLU, and of spectra that are listed in part."""
    plain = fake()
    other = replace(plain, claims={name: claim._replace(text=f"{claim.text}, λ of Θ_frozen")
                                   for name, claim in plain.claims.items() if name != "product"})
    for pair in ({"a": plain, "b": other}, {"b": other, "a": plain}):
        rows = {row[0]: row[1:] for row in cells(html.page(pair, title="", settings={}, environment={})) if row}
        (worded,) = [row for row in rows if row.startswith("first_nu")]
        assert worded.count("λi ≤ ν1 πi") == 2
        assert worded.count("frozen") == 1
        (single,) = [row for row in rows if row.startswith("product")]
        assert "frozen" not in single
        assert "not made" in rows[single]
        print_reports(Console(width=200), pair, {})
        printed = capsys.readouterr().out
        assert printed.count("λ of Θ_frozen") == len(other.claims)
        assert printed.count("not made") == 1
