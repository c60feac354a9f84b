"""The documentation builds without a warning, says what the code says, and what it shows runs."""

import ast
import doctest
import html
import importlib
import importlib.util
import inspect
import json
import operator
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pkjax as pk
import pytest
from pkjax.cli import main as command_line
from pkjax.experiments.settings import read_grid

from tests.house.test_architecture import FLOOR, FLOORS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODULES = ("paths", "path_kernel", "dynamics", "training", "plots", "experiments", "models", "data")
QUICK = ("index.md", "correctness.md", "faq.md")
"""Pages whose examples take a few seconds."""
CLOSE = 0.02
"""Relative difference that a printed number may have from the page's: machines round differently."""
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(DOCS))


def loaded(file):
    """The module that a file outside of any package defines."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the pages show


def examples(text):
    """(code, the output that stands below it) of every example of a page."""
    return re.findall(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE)


def assert_same(printed, shown, rtol=CLOSE, atol=0.0):
    """The same words, and the same numbers but for rounding."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), f"printed:\n{printed}\nshown:\n{shown}"
    np.testing.assert_allclose([float(n) for n in NUMBER.findall(printed)], [float(n) for n in NUMBER.findall(shown)],
                               rtol=rtol, atol=atol, err_msg=printed)


def marked(page):
    return pytest.param(page, id=name(page), marks=() if name(page) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if fenced(page.read_text(), "python")])
def test_examples_run_from_top_to_bottom_and_print_what_the_page_says(page, tmp_path, request):
    shown_examples = examples(page.read_text())
    assert len(shown_examples) == len(fenced(page.read_text(), "python"))
    code = "\nprint('\\x1e')\n".join(code for code, _ in shown_examples)
    compiled = request.config.cache.mkdir("compiled")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(compiled),
                               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
    assert done.returncode == 0, done.stderr
    for printed, (_, shown) in zip(done.stdout.split("\x1e\n"), shown_examples, strict=True):
        assert_same(printed, shown)


def test_a_wrong_number_and_a_wrong_word_are_noticed():
    assert_same("λ₁ = 2.001 of 10", "λ₁ = 2.0 of 10")
    for wrong in ("λ₁ = 2.1 of 10", "λ₂ = 2.0 of 10", "λ₁ = 2.0 of 10 10"):
        with pytest.raises(AssertionError):
            assert_same(wrong, "λ₁ = 2.0 of 10")


def commands(text):
    lines = [line for block in fenced(text, "bash") for line in block.replace("\\\n", "").splitlines()]
    return [parts[1:] for line in lines if (parts := shlex.split(line, comments=True))[:1] == ["pkjax"]]


def test_every_command_line_is_one():
    lines = [(name(page), argv) for page in PAGES for argv in commands(page.read_text())]
    assert len(lines) > 15
    for page, argv in lines:
        try:
            command_line._parse(argv)
        except command_line._UsageError as error:
            pytest.fail(f"{page}: pkjax {shlex.join(argv)}: {error.args}")


def titled(text):
    """The files that a page shows: their names and what stands in them."""
    return dict(re.findall(r'^```(?:python|toml) title="([\w.]+)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE))


def test_every_sweep_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    grids = 0
    for page in PAGES:
        shown = titled(page.read_text()) | {f"{page.stem}_{i}.toml": block for i, block
                                            in enumerate(fenced(page.read_text(), "toml"))}
        for file, content in shown.items():
            (tmp_path / file).write_text(content)
        for file in shown:
            if file.endswith(".toml"):
                assert len(read_grid(tmp_path / file)) > 1
                grids += 1
    assert grids > 1


def test_the_picture_shows_a_product_of_three_matrices():
    picture = loaded(DOCS / "pictures" / "sum_over_paths.py")
    shown = picture.matrices()
    assert shown["Π"].shape == (12, 12)
    np.testing.assert_allclose(shown["J"] @ shown["Π"] @ shown["J"].T, shown["Θ"], atol=1e-12)
    assert len(picture.draw().axes) == 5


def test_the_picture_of_the_package_shows_its_imports_and_they_point_down():
    pytest.importorskip("matplotlib")
    house = loaded(DOCS / "pictures" / "house.py")
    drawn = html.unescape((DOCS / "pictures" / "house.svg").read_text())
    assert repr(house.arrows()) in drawn, "python -m docs.pictures.house docs/pictures/house.svg draws it anew"
    rows = {name: row for name, (_, row, _) in house.ROOMS.items()}
    assert all(rows[source] > rows[end] for source, end in house.arrows())
    assert set(house.ROOMS) == {house.GROUND, *FLOOR} - {*FLOORS[0], "__main__"}
    assert len(house.draw().axes) == 1


# Measured figures are those of the benchmarks

UNITS = {"ms": 1e-3, "s": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def rows(page, start):
    """The cells of a table of a page, by the first of each row; the table begins after the text ``start``."""
    text = (DOCS / page).read_text()
    table = text[text.index(start):]
    lines = re.search(r"(?:^\|.*\n)+", table, re.MULTILINE)[0].splitlines()[2:]
    cells = [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def quantities(cell):
    return [float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (ms|s|kB|MB|GB)\b", cell)]


def result(file):
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text())["networks"]


def test_accuracies_of_the_authors_code_are_those_of_its_sweep():
    table = rows("claims.md", "pkjax sweep benchmarks/sweeps/authors.toml")
    runs = pytest.importorskip("pandas").read_parquet(ROOT / "benchmarks" / "results" / "authors.parquet")
    runs = runs.assign(pruner=runs["pruner"].str.replace("authors:", "").str.replace("_", "-"))
    mean = (100 * runs.groupby(["pruner", "compression"])["test_accuracy"].mean()).round(1)
    (dense,) = [re.search(r"dense ([\d.]+)", row)[1] for row in table if "dense" in row]
    assert float(dense) == mean["none", 0.0]
    shown = {row.lower(): [float(cell) for cell in cells] for row, cells in table.items() if "dense" not in row}
    assert shown == {pruner: [mean[pruner, c] for c in (1.0, 2.0, 3.0)] for pruner in set(runs["pruner"]) - {"none"}}


def test_accuracies_of_pruners_that_train_are_those_of_their_sweep():
    table = rows("claims.md", "Mean test accuracy over three seeds in percent")
    runs = pytest.importorskip("pandas").read_parquet(ROOT / "benchmarks" / "results" / "imp.parquet")
    mean = (100 * runs.groupby(["pruner", "compression"])["test_accuracy"].mean()).round(1)
    for row, pruner in (("*magnitude after training*", "magnitude-after-training"), ("*IMP with rewinding*", "imp")):
        assert [float(cell) for cell in table[row] if cell] == [mean[pruner, c] for c in (1.0, 2.0, 3.0)]


def test_masks_and_accuracies_of_the_transformer_are_those_of_its_sweep():
    pandas = pytest.importorskip("pandas")
    folder = ROOT / "benchmarks" / "results"
    runs, kept = pandas.read_parquet(folder / "vit.parquet"), json.loads((folder / "vit_layers.json").read_text())
    pruners = ("random", "magnitude", "snip", "synflow")
    table = rows("guides/transformers.md", "What each pruner keeps")
    assert len(table) == len(kept["snip"]["1"])
    for row, cells in table.items():
        (kind,) = [kind for kind in kept["snip"]["1"] if kind.endswith(f"{row.strip('`')}/kernel")]
        assert [float(cell) for cell in cells] == [round(100 * kept[pruner]["1"][kind], 1) for pruner in pruners]
    table = {row.lower(): cells for row, cells in rows("guides/transformers.md", "### How they train").items()}
    (dense,) = [row for row in table if row.startswith("dense")]
    assert table.pop(dense) == ["", "", ""]
    shown = {("none", 0.0): dense.removeprefix("dense: ")} | {
        (row, c): cell for row, cells in table.items() for c, cell in zip((0.5, 1.0, 2.0), cells, strict=True)}
    assert shown == {case: ", ".join(f"{100 * accuracy:.1f}" for accuracy in group.sort_values("seed")["test_accuracy"])
                     for case, group in runs.groupby(["pruner", "compression"])}


def test_correlations_of_traces_with_spectra_are_the_benchmarks():
    files = {"FC-100": "fc-100", "ResNet-20": "resnet20", "VGG-11-BN": "vgg11"}
    symbols = {"Tr Π": "trace_pi", "gated trace": "gated_trace"}
    kinds = {"seeds": "seeds", "compressions": "compressions", "pruners": "names", "all": "all"}
    table = rows("claims.md", "Spearman's rank correlations, the mean over groups")
    assert {row.split(",")[0] for row in table} == set(files)
    for row, cells in table.items():
        network, of, kind = re.fullmatch(r"(.+), (.+) over (\w+)", row).groups()
        file = ROOT / "benchmarks" / "results" / f"trace_against_spectrum_{files[network]}.json"
        content = json.loads(file.read_text())
        found = pk.Comparison.from_dict(content["comparison"]).correlations[kinds[kind]][symbols[of]]
        for cell, to in zip(cells, ("trace_ntk", "largest", "effective_rank", "decay"), strict=True):
            value, *spread = (float(number) for number in cell.replace("−", "-").split(" ± "))
            assert value == pytest.approx(found[to].value, abs=0.0051)
            assert spread == ([] if np.isnan(found[to].low) else [
                pytest.approx((found[to].high - found[to].low) / 2, abs=0.0051)])


def test_the_comparison_of_tangent_kernels_is_the_benchmarks():
    measured, compared = result("ntk.json"), 0
    for row, cells in rows("comparison.md", "Machine: two cores").items():
        network, examples = row.split(", ")
        figures = measured.get(f"{network}, N = {examples}", measured[network])
        assert figures["examples"] == int(examples)
        for side, cell in zip(("pkjax", "neural-tangents 1", "neural-tangents 2"), cells, strict=True):
            if side not in figures["seconds"]:
                assert "ms" not in cell
                continue
            want = [figures["seconds"][side]["median"], figures["peak_bytes"][side]]
            np.testing.assert_allclose(quantities(cell), want, rtol=0.05, err_msg=f"{row}, {side}")
            compared += 1
    assert compared == sum(len(figures["seconds"]) for figures in measured.values())


def test_the_comparison_of_pruning_is_the_benchmarks():
    measured = result("pruning.json")
    table = rows("comparison.md", "two threads each")
    assert len(table) == len(measured)
    for row, cells in table.items():
        figures = measured["VGG-16-BN" if row.startswith("VGG") else row]
        want = [figures["seconds"][what][side][which] for what, which in (("loop, per step", "median"),
                                                                       ("score alone", "median"))
                for side in ("pkjax", "pytorch")]
        want += [figures["peak_bytes"][side] for side in ("pkjax", "pytorch")]
        want += [figures["seconds"]["one step"][side]["first"] for side in ("pkjax", "pytorch")]
        np.testing.assert_allclose([value for cell in cells for value in quantities(cell)], want, rtol=0.07,
                                   err_msg=row)


def test_the_figures_of_a_card_are_those_that_were_measured_on_it():
    def measured(part, **chosen):
        content = json.loads((ROOT / "benchmarks" / "results" / "accelerator" / f"{part}.json").read_text())
        return next(row for row in content["rows"] if chosen.items() <= row.items())

    table = rows("accelerators.md", "gave this much")
    (epoch,) = (cells for what, cells in table.items() if "an epoch" in what)
    one = measured("training", networks=1)
    np.testing.assert_allclose([*quantities(epoch[0]), *quantities(epoch[2])],
                               [np.median(one["later_epochs"]), one["first_epoch"]], rtol=0.01)
    theta = measured("exactness", network="fc-500", examples=64, function="ntk")
    cells = table["`ntk`, FC-500, N = 64"]
    np.testing.assert_allclose([*quantities(cells[0]), *quantities(cells[2])], [theta["again"], theta["first"]],
                               rtol=0.01)
    assert f"{theta['difference'] * 1e7:.1f} · 10⁻⁷" in (DOCS / "accelerators.md").read_text()
    compared = 0
    for what, (ours, theirs, first) in table.items():
        if what.startswith("`prune`"):
            name = what.split(", ")[1].replace(" with BatchNorm", "-BN")
            here, there = (measured("pruning", network=name, side=side) for side in ("pkjax", "torch on cuda"))
            shown, *spread = quantities(ours)
            np.testing.assert_allclose([shown, *quantities(first)], [here["median"], here["first"]], rtol=0.02)
            np.testing.assert_allclose(spread, [here["min"], here["max"]] if spread else [], rtol=0.01)
            assert theirs == "unfinished" if "unfinished" in there else quantities(theirs) == [
                pytest.approx(there["median"], rel=0.01)]
            for seconds in (here["median"], there.get("median")):
                assert seconds is None or f"{seconds:.3f} s" in (DOCS / "comparison.md").read_text()
            compared += 1
    assert compared == 3
    differing = measured("pruning", network="FC-500", side="torch on cuda")["masks_differ"]
    assert all(f"{differing:,} of" in " ".join((DOCS / page).read_text().split())
               for page in ("accelerators.md", "comparison.md"))


def test_the_scale_of_path_kernels_is_the_benchmarks():
    measured = result("path_kernel.json")
    cells = rows("scale.md", "## The path kernel")["Tr Π"]
    want = [measured[n]["seconds"]["trace"]["median"] for n in ("FC-100", "FC-2000", "ResNet-20", "VGG-16-BN")]
    np.testing.assert_allclose([value for cell in cells for value in quantities(cell)], want, rtol=0.08)


# The built pages


class Page(HTMLParser):
    """The links of a page with their texts, its anchors, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded, self.open = [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        have = dict(attributes)
        self.anchors.add(have.get("id"))
        if tag == "a":
            self.open = [have.get("href"), ""]
        elif tag in ("script", "img", "iframe", "source"):
            self.loaded.append(have.get("src"))
        elif tag == "link" and have.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(have.get("href"))

    def handle_data(self, data):
        if self.open:
            self.open[1] += data

    def handle_endtag(self, tag):
        if tag == "a" and self.open:
            self.links.append(tuple(self.open))
            self.open = None


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as MkDocs builds them, where a warning is an error."""
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed, reason="the extra docs is not installed")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)], cwd=ROOT,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def public():
    """(the name a user writes, the last part of its anchor) of every public function, class and module."""
    for module, prefix in ((pk, "pk"), *((getattr(pk, each), f"pk.{each}") for each in MODULES)):
        listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        yield from ((f"{prefix}.{each}", None if inspect.ismodule(getattr(module, each)) else each)
                    for each in listed)


def test_every_public_name_has_its_formula_and_its_reference(site):
    links = {}
    for href, text in Page((site / "formulae.html").read_text()).links:
        links.setdefault(text.strip(), []).append(href)
    reference = {page.name: Page(page.read_text()) for page in (site / "reference").glob("*.html")}
    names = list(public())
    assert len(names) > 100
    for written, last in names:
        assert written in links, f"{written} is missing on the page of formulae"
        for href in links[written]:
            page, anchor = re.fullmatch(r"reference/(\w+\.html)(?:#(.+))?", href).groups()
            assert page in reference
            if anchor or last:
                assert anchor in reference[page].anchors
            assert last is None or anchor.split(".")[-1] == last


def test_the_page_of_questions_names_everything_public_with_arguments_that_exist():
    """Links are `name` or `name(arguments)`; "…" stands for arguments that are left out."""
    links = re.findall(r"\[`(pk[\w.]*)(\(.*?\))?`\]", (DOCS / "which_call.md").read_text())
    assert {written for written, _ in public()} == {written for written, _ in links}
    checked = 0
    for written, arguments in links:
        if not arguments:
            continue
        call = ast.parse(f"f{arguments.replace('…', '...')}", mode="eval").body
        left_out = any(isinstance(each, ast.Constant) and each.value is ... for each in call.args)
        signature = inspect.signature(operator.attrgetter(written.removeprefix("pk."))(pk))
        named = {each.arg: None for each in call.keywords}
        if left_out:
            assert set(named) <= set(signature.parameters), written
        else:
            try:
                signature.bind(*call.args, **named)
            except TypeError as error:
                pytest.fail(f"{written}{arguments}: {error}")
        checked += 1
    assert checked > 60


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES} <= built
    for page in built:
        text = (site / page).read_text()
        loaded = [url for url in Page(text).loaded if url]
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page
        assert 'class="arithmatex"' not in text, f"{page} has a formula that is not drawn"


def test_no_docstring_shows_its_markup(site):
    for page in (site / "reference").glob("*.html"):
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        for left in (".. math", ":func:", ":class:", "&gt;&gt;&gt;", "``", "$$"):
            assert left not in prose, f"{page.name} shows {left}"


def test_the_hook_that_draws_formulae_does_as_its_example_says():
    pytest.importorskip("latex2mathml")
    module = loaded(DOCS / "plugins" / "mathml.py")
    tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried.attempted > 0
    assert tried.failed == 0
