"""Frozen gates on the command line: who needs them is told so, and what is not pruned is named."""

import json
import re
from pathlib import Path

import jax
import pkjax as pk
import pytest
from pkjax.analysis.comparison import Comparison
from pkjax.cli import options
from pkjax.cli.main import main

from tests.fake_report import report as fake

VIT = ["--model", "vit_tiny-4x1", "--samples", "2"]
LEFT = "blocks/0/attention/key/kernel, blocks/0/attention/query/kernel"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(("argv", "says"), [
    (["prune", *VIT], "vit_tiny-4x1 is not a sum over paths: .*; what to do: pass --gates frozen"),
    (["analyze", *VIT], "vit_tiny-4x1 is not a sum over paths: .*; what to do: pass --gates frozen"),
    (["compare", *VIT], "vit_tiny-4x1 is not a sum over paths: .*; what to do: pass --gates frozen"),
    (["train", *VIT[:2]], "vit_tiny-4x1 is not a sum over paths, .*--gates frozen on the command line"),
    (["prune", "--gates", "open"], "--gates must be frozen, or left out, got 'open'"),
    (["train", "--gates", "open"], "--gates must be frozen, or left out, got 'open'"),
    (["compare", "--gates", "frozen", "--reference", "zeros"], "--reference must be ones or images, got 'zeros'"),
    (["analyze", "--reference", "images"], "--reference says where gates are frozen: set --gates to frozen")])
def test_what_does_not_fit_is_one_line_before_anything_is_computed(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(pk, "prune", None)
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n"), list(Path().iterdir())) == ("", 1, [])
    assert re.search(says, shown.err)


def test_prune_leaves_queries_and_keys_and_says_so(capsys):
    assert main(["prune", *VIT, "--gates", "frozen", "--reference", "images", "--compression", "0.3"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"pkjax: note: not pruned, as they make coefficients and lie on no path: {LEFT}\n"
    assert max(map(len, shown.out.splitlines())) <= 80
    net = options.network(options.Prune(model="vit_tiny-4x1", samples=2))
    masks = pk.load_masks("masks.npz", like=net.params)
    whole = dict(zip(pk.trees.leaf_names(masks), (mask.all() for mask in jax.tree.leaves(masks)), strict=True))
    assert [name for name in whole if not whole[name]] == [
        f"blocks/0/{name}/kernel" for name in ("attention/out", "attention/value", "mlp/down", "mlp/up")] + [
        "patches/conv/kernel"]


@pytest.mark.parametrize(("reference", "examples"), [("ones", 1), ("images", 2)])
def test_analyze_freezes_gates_where_it_is_told_to(reference, examples, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(pk, "analyze", lambda *_, **given: calls.append(given) or fake())
    argv = ["analyze", *VIT, "--gates", "frozen", "--reference", reference, "--pruner", "magnitude"]
    assert main(argv) == 0
    assert f"lie on no path: {LEFT}" in capsys.readouterr().err
    assert [(given["gates"], given["reference"].shape) for given in calls] == 2 * [("frozen", (examples, 8, 8, 1))]
    written = json.loads(Path("pkjax-report/report.json").read_text())["settings"]
    assert (written["gates"], written["reference"]) == ("frozen", reference)


def test_compare_freezes_gates_and_counts_layers_that_are_lost(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(pk, "compare", lambda *_, **given: calls.append(given) or Comparison(
        rows=(), spectra={}, samples=2, outputs=10, dtype="float32"))
    argv = ["compare", *VIT, "--gates", "frozen", "--pruners", "magnitude,random", "--compressions", "0.3,1.9"]
    assert main([*argv, "--seeds", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0].endswith(LEFT)
    assert re.fullmatch(r"pkjax: note: some layers have lost all weights: \d by magnitude to 1\.9"
                        r"(, \d by random to 1\.9)?", shown.err.splitlines()[1])
    (given,) = calls
    assert (given["gates"], given["reference"].shape) == ("frozen", (1, 8, 8, 1))
    lost = [sum(not mask.any() for mask in jax.tree.leaves(masks)) for masks in given["masks"].values() if masks]
    assert sum(map(int, re.findall(r"(\d) by", shown.err))) == sum(lost) > 0
