"""The commands write what they say, whole or not at all, and refuse what does not fit in one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pkjax as pk
import pytest
from pkjax.cli import commands, options
from pkjax.cli.main import main
from pkjax.experiments import methods, records
from pkjax.experiments.settings import grid

from tests.fake_report import report as fake

SMALL = ["--model", "fc-6x1", "--samples", "2", "--k", "5", "--pruner", "magnitude"]
NET = SMALL[:4]
WEIGHTS = 64 * 6 + 60
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def initial():
    return options.network(options.Prune(model="fc-6x1", samples=2))


def test_analyze_writes_a_folder_that_says_what_analyze_returns(capsys):
    assert main(["analyze", *SMALL]) == 0
    folder = Path("pkjax-report")
    assert sorted(os.listdir()) == ["pkjax-report"]
    assert sorted(os.listdir(folder)) == ["dense.png", "masks.npz", "pruned.png", "report.html", "report.json"]
    written = json.loads((folder / "report.json").read_text())
    net = initial()
    masks = pk.load_masks(folder / "masks.npz", like=net.params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim > 1) == round(WEIGHTS / 10)
    for name, mask in (("dense", None), ("pruned", masks)):
        X = jax.numpy.asarray(net.dataset.images)
        theta = np.asarray(pk.ntk(net.apply_fn, net.params, X, masks=mask, engine="jacobian"))
        lam = np.linalg.eigvalsh(theta.transpose(0, 2, 1, 3).reshape(20, 20))[::-1]
        np.testing.assert_allclose(written[name]["lam"], lam, rtol=1e-4, atol=1e-5 * lam[0])
        assert len(written[name]["pi"]) == 5
    assert written["settings"]["steps"] == 1
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "report: pkjax-report/report.html" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "false in general" in shown.out


def counted(apply_fn, params, X, *, masks=None, **options):
    """A made-up report that counts the masks it is given."""
    kept = [np.asarray(m) for m in jax.tree.leaves(masks) if m.ndim > 1]
    layers = tuple(pk.LayerReport(str(i), m.shape, int(m.sum()), m.size, False) for i, m in enumerate(kept))
    return dataclasses.replace(fake(n=20, k=5), layers=layers)


def test_prune_keeps_exactly_the_largest_weights_and_analyze_takes_its_masks(capsys, monkeypatch):
    assert main(["prune", *NET, "--pruner", "magnitude", "--compression", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert os.listdir() == ["masks.npz"]
    net = initial()
    masks = pk.load_masks("masks.npz", like=net.params)
    pairs = [(np.abs(p).ravel(), np.asarray(m).ravel()) for p, m in
             zip(jax.tree.leaves(net.params), jax.tree.leaves(masks), strict=True) if p.ndim > 1]
    sizes, kept = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert kept.sum() == round(WEIGHTS * 10**-0.5)
    assert sizes[kept].min() > sizes[~kept].max()
    assert f"{kept.sum():,}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    monkeypatch.setattr(pk, "analyze", counted)
    assert main(["analyze", *SMALL, "--masks", "masks.npz", "--output", "out"]) == 0
    written = json.loads(Path("out/report.json").read_text())
    assert sum(layer["kept"] for layer in written["pruned"]["layers"]) == kept.sum()
    assert "pruner" not in written["settings"]


def test_compare_takes_functions_of_the_current_folder(capsys, monkeypatch):
    Path("scores_of_compare.py").write_text("import jax\ndef mine(params): return jax.tree.map(abs, params)\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(["compare", *NET, "--pruners", "magnitude,scores_of_compare:mine", "--compressions", "1",
                 "--seeds", "0", "--k", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows[1][0] == "magnitude"
    assert rows[1][1:] == rows[2][1:]


def test_help_shows_lists_as_they_are_typed(capsys):
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(default in " ".join(text.split()) for default in ("0.5,1.0,1.5", "0,1,2", "magnitude,snip,"))
    assert max(map(len, text.splitlines())) <= 80


def test_compare_writes_and_prints_what_compare_returns(capsys):
    assert main(["compare", *NET, "--pruners", "magnitude,random", "--compressions", "0.3,1", "--seeds", "0,3",
                 "--json", "results.json", "--png", "picture.png"]) == 0
    assert sorted(os.listdir()) == ["picture.png", "results.json"]
    shown, written = capsys.readouterr(), json.loads(Path("results.json").read_text())
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "10 networks on 2 examples of 10 outputs" in shown.out
    assert "results: results.json; picture: picture.png" in shown.out
    assert Path("picture.png").read_bytes()[1:4] == b"PNG"
    assert (written["settings"]["pruners"], written["settings"]["seeds"]) == (["magnitude", "random"], [0, 3])
    rows = pk.Comparison.from_dict(written).rows
    assert [row[:3] for row in rows[:3]] == [("dense", 0.0, 0), ("dense", 0.0, 3), ("magnitude", 0.3, 0)]
    net = options.initialised(options.Compare(model="fc-6x1"), pk.data.load("digits", samples=2), 3)
    apply_fn, params = net.apply_fn, net.params
    masks = pk.prune(pk.magnitude, params, compression=1).masks
    row = next(row for row in rows if row[:3] == ("magnitude", 1.0, 3))
    X = jax.numpy.asarray(net.dataset.images)
    theta = pk.ntk(apply_fn, params, X, masks=masks, engine="jacobian")
    np.testing.assert_allclose(row.trace_ntk, np.einsum("nnkk->", theta), rtol=1e-4)
    np.testing.assert_allclose(row.trace_pi, pk.path_kernel.trace(
        apply_fn, params, jax.numpy.ones_like(X[:1]), masks=masks), rtol=1e-5)


@pytest.mark.parametrize("pruner", methods.PRUNERS)
def test_every_pruner_keeps_the_exact_count(pruner):
    assert main(["prune", "--model", "fc-6x1", "--samples", "8", "--pruner", pruner, "--steps", "2"]) == 0
    masks = pk.load_masks("masks.npz", like=initial().params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim > 1) == round(WEIGHTS / 10)


def test_dist_scores_take_the_mean_of_the_raw_images():
    chosen = options.Prune(model="fc-6x1", samples=8, pruner="synflow-dist")
    net = options.network(chosen)
    got = methods.score(chosen.pruner, net.apply_fn, net.dataset, seed=0)(net.params)
    mean = pk.data.load("digits", samples=8, normalize=False).images.mean(0, keepdims=True)
    want = pk.synflow(net.apply_fn, net.params, jax.numpy.asarray(mean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    dark = np.asarray(got["Dense_0"]["kernel"])[mean.ravel() == 0]
    assert len(dark) > 0
    assert not dark.any()                                # pixels that are never lit carry nothing


@pytest.mark.parametrize("pruner", ["path-exclusion", "ntk-trace"])
def test_scores_of_images_know_absent_weights_and_take_the_steps_of_their_authors(pruner):
    chosen = options.Prune(model="fc-6x1", samples=8, pruner=pruner)
    net = options.network(chosen)
    saliency = {"path-exclusion": pk.path_exclusion, "ntk-trace": pk.ntk_trace_saliency}[pruner]
    masks = pk.prune(pk.magnitude, net.params, density=0.5).masks
    X = jax.numpy.asarray(net.dataset.images)
    got = methods.score(pruner, net.apply_fn, net.dataset, seed=0)(net.params, masks)
    want = saliency(net.apply_fn, net.params, X, masks=masks)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert methods.steps_of(pruner, None) == {"path-exclusion": 100, "ntk-trace": 1}[pruner]
    assert main(["prune", "--model", "fc-6x1", "--samples", "8", "--pruner", pruner, "--steps", "3"]) == 0
    kept = pk.load_masks("masks.npz", like=net.params)
    want = pk.prune(lambda params, masks: saliency(net.apply_fn, params, X, masks=masks), net.params, compression=1,
                    steps=3).masks
    jax.tree.map(np.testing.assert_array_equal, kept, want)


@pytest.mark.parametrize("command", ["prune", "analyze", "train"])
def test_a_compression_that_keeps_nothing_is_an_error_that_names_what_keeps_some(command, capsys):
    small = ["--model", "fc-6x1", "--pruner", "magnitude"]
    assert main([command, *small, "--compression", "9"]) == 2
    shown = capsys.readouterr()
    assert f"error: a compression of 9 keeps none of the {WEIGHTS} weights; one below 2.94 keeps some\n" in shown.err
    assert not any(Path().rglob("*.npz"))
    with pytest.warns(pk.EmptiedLayerWarning):
        assert methods.pruned(pk.magnitude, initial().params, compression=2.939, steps=1).kept == 1
    with pytest.raises(ValueError, match="keeps none of the 444"):
        methods.pruned(pk.magnitude, initial().params, compression=2.96, steps=1)


def test_only_warnings_meant_for_the_user_become_notes(monkeypatch, capsys):
    class OldName(UserWarning, DeprecationWarning):
        pass

    def noisy(*args):
        warnings.warn("old name", OldName, stacklevel=1)
        warnings.warn("thin\nlayer", pk.EmptiedLayerWarning, stacklevel=1)

    monkeypatch.setattr(commands, "prune", noisy)
    monkeypatch.setattr("pkjax.cli.screen.layers_table", lambda result: "")
    assert main(["prune", *NET]) == 0
    assert capsys.readouterr().err == "pkjax: note: thin layer\n"


BAD = [
    (["analyze", "--model", "fc-0"],
     "unknown model 'fc-0'; choose fc-WIDTH or fc-WIDTHxDEPTH (such as fc-100x6), or one of vgg11"),
    (["analyze", "--model", "lenet"], "unknown model 'lenet'"),
    (["analyze", "--data", "imagenet"], "unknown data set 'imagenet'; choose from digits, mnist"),
    (["prune", "--pruner", "oracle"], "unknown pruner 'oracle'; choose from random, magnitude"),
    (["prune", "--compression", "-1"], "--compression must be a number of at least 0"),
    (["prune", "--compression", "nan"], "--compression must be a number of at least 0"),
    (["prune", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["prune", "--samples", "5000"], "samples must be between 1 and 1437, got 5000"),
    (["prune", "--steps", "0"], "--steps must be at least 1"),
    (["prune", "--seed", "-1"], "--seed must not be negative"),
    (["prune", "--seed", "4294967296"], "--seed must be at most 4294967295, got 4294967296"),
    (["train", "--seed", "4294967296"], "seed must be at most 4294967295"),
    (["prune", "--samples", "x"], "--samples: expected a whole number, got 'x' (see pkjax prune --help)"),
    (["prune", "--compression", "x"], "--compression: expected a number, got 'x'"),
    (["train", "--drops", "60,x"], "--drops: expected whole numbers with commas between them, got '60,x'"),
    (["analyze", "--sampels", "3"], "Unrecognized options: --sampels, 3; did you mean --samples (see pkjax analyze"),
    (["prune", "--steps"], "--steps"),
    (["analyse"], "unknown command 'analyse'; choose from analyze, compare, prune, train, sweep, figures (see pkjax"),
    (["--model", "fc-6x1"], "name a command first: analyze, compare, prune, train, sweep, figures (see"),
    ([], "name a command first: analyze, compare, prune, train, sweep, figures (see"),
    (["analyze", "--output", "there.txt"], "there.txt is a file; give --output the folder"),
    (["prune", "--output", "."], "is a folder; give --output the file"),
    (["prune", "--output", "no/such/masks.npz"], "there is no folder no/such"),
    (["analyze", "--output", "no/such/report"], "there is no folder no/such"),
    (["analyze", "--model", "vgg11"], "at least 16×16 pixels"),
    (["analyze", "--masks", "missing.npz"], "missing.npz: No such file"),
    (["analyze", "--masks", "there.txt"], "there.txt"),
    (["analyze", *SMALL, "--k", "0"], "k must be between 1 and"),
    (["compare", "--pruners", "snip,oracle"], "unknown pruner 'oracle'; choose from random, magnitude"),
    (["compare", "--compressions", "1,x"], "--compressions: expected numbers with commas between them, got '1,x'"),
    (["compare", "--compressions", "1,-1"], "--compressions must be a number of at least 0, got -1"),
    (["compare", "--seeds", "0,1,0"], "--seeds names a value twice: 0,1,0"),
    (["compare", "--seeds", "-1"], "--seeds must not be negative, got -1"),
    (["compare", "--k", "-1"], "--k must be at least 0, got -1"),
    (["compare", "--json", "no/such/results.json"], "there is no folder no/such for results.json"),
    (["compare", "--json", "."], ". is a folder; give --json the file to write"),
    (["compare", "--png", "a.pgn"], "--png a.pgn does not end as a picture: choose from"),
    (["train", "--pruner", "oracle"], "unknown pruner 'oracle'; choose from none, random"),
    (["train", "--compression", "1"], "--compression 1 has no effect with --pruner none: name a pruner"),
    (["train", "--epochs", "0"], "epochs must be at least 1"),
    (["train", "--learning-rate", "-1"], "learning_rate must be positive"),
    (["train", "--output", "there.txt"], "there.txt is a file; give --output the folder"),
    (["train", "--output", "no/such/run"], "there is no folder no/such"),
    (["sweep"], "Missing from pkjax sweep: CONFIG TOML file"),
    (["sweep", "missing.toml"], "missing.toml: No such file"),
    (["figures"],
     "Missing from pkjax figures: FIGURE Which figure: 1, 2, 3, predictors, captured or claims. (required)"),
    (["sweep", "there.txt"], "there.txt is not a TOML file"),
    (["figures", "4", "results"], "unknown figure '4'; choose from 1, 2, 3, predictors"),
    (["figures", "3", "results"], "no records of runs in results"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv[-3:]) or "nothing" for argv, _ in BAD])
def test_bad_options_and_files_get_one_line_and_leave_nothing(argv, says, capsys):
    Path("there.txt").write_text("no masks")
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pkjax: error: ")
    assert shown.err.count("\n") == 1
    assert says in shown.err
    assert os.listdir() == ["there.txt"]


def test_masks_of_another_network_are_refused(capsys):
    assert main(["prune", "--model", "fc-5x1", "--pruner", "magnitude"]) == 0
    capsys.readouterr()
    assert main(["analyze", *SMALL, "--masks", "masks.npz"]) == 2
    assert "Dense_0" in capsys.readouterr().err
    assert os.listdir() == ["masks.npz"]


def test_a_failure_on_the_way_leaves_the_earlier_report_alone(monkeypatch, capsys):
    Path("pkjax-report").mkdir()
    Path("pkjax-report/report.html").write_text("earlier")
    Path("pkjax-report/notes.txt").write_text("mine")

    def fail(*args, **kwargs):
        raise ValueError("no page\ntoday")

    monkeypatch.setattr(pk, "analyze", lambda *args, **options: fake(n=20, k=5))
    with monkeypatch.context() as patch:
        patch.setattr(commands.html, "page", fail)
        assert main(["analyze", *SMALL]) == 2
    assert capsys.readouterr().err == "pkjax: error: no page today\n"
    assert Path("pkjax-report/report.html").read_text() == "earlier"
    assert os.listdir() == ["pkjax-report"]
    assert main(["analyze", *SMALL]) == 0
    assert Path("pkjax-report/report.html").read_text() != "earlier"
    assert Path("pkjax-report/notes.txt").read_text() == "mine"
    assert os.listdir() == ["pkjax-report"]


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["analyze"]) == 2
    assert capsys.readouterr().err == "pkjax: error: the command line needs tyro: pip install 'pkjax[cli]'\n"


def run(*argv, **environment):
    return subprocess.run([sys.executable, "-m", "pkjax", *argv], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment})


@pytest.mark.parametrize("command", ["analyze", "prune", "train", "sweep", "figures"])
def test_help_fits_a_terminal_of_80_columns(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--output" in shown
    assert "None" not in shown                           # defaults are said in words
    assert max(map(len, shown.splitlines())) <= 80


TRAIN = ["train", "--model", "fc-6x1", "--train-samples", "96", "--epochs", "2", "--pruner", "magnitude",
         "--compression", "0.5"]


def test_train_writes_a_folder_whose_network_has_the_masked_zeros(capsys):
    assert main([*TRAIN, "--output", "run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 80
    assert sorted(os.listdir("run")) == ["checkpoint", "masks.npz", "record.json", "training.png"]
    record = json.loads(Path("run/record.json").read_text())
    assert record["settings"]["epochs"] == 2
    assert f"{100 * record['history'][-1]['test_accuracy']:.2f} %" in shown.out
    net = initial()
    masks = pk.load_masks("run/masks.npz", like=net.params)
    back = pk.training.restore("run/checkpoint")
    assert back.finished
    for leaf, mask in zip(jax.tree.leaves(back.params), jax.tree.leaves(masks), strict=True):
        assert not np.asarray(leaf)[~np.asarray(mask)].any()
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim > 1) == round(WEIGHTS * 10**-0.5)
    assert main([*TRAIN, "--output", "run"]) == 0                        # all is done: the same is said again
    assert main([*TRAIN, "--output", "run", "--seed", "1"]) == 2
    assert "holds a checkpoint of another training" in capsys.readouterr().err


def test_an_interrupted_training_says_how_it_goes_on(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.experiments, "run", interrupt, raising=False)
    assert main(TRAIN) == 130
    assert "run the same command to resume" in capsys.readouterr().err


def test_a_sweep_and_its_figures(capsys):
    Path("small.toml").write_text(
        '[defaults]\nmodel = "fc-6x1"\nepochs = 1\ntrain_samples = 96\ntest_samples = 50\ntraces = 2\n'
        'output_samples = 4\nprune_steps = 2\n[[grid]]\npruner = ["none", "magnitude"]\ncompression = [0.5, 1, 1.5]\n')
    assert main(["sweep", "small.toml"]) == 0
    shown = capsys.readouterr().out
    assert "4 runs, 0 of them failed, 0 recorded before; table: small/table.parquet" in shown
    for name in ("1", "2", "3", "predictors"):
        assert main(["figures", name, "small"]) == 0
        assert Path(f"small/figure-{name}.png").read_bytes().startswith(b"\x89PNG")
    Path("small/table.parquet").rename("alone.parquet")
    assert main(["figures", "3", "alone.parquet"]) == 0
    assert Path("figure-3.png").read_bytes() == Path("small/figure-3.png").read_bytes()
    assert main(["figures", "3", "small", "--output", "three.svg"]) == 0
    assert "<svg" in Path("three.svg").read_text()
    assert main(["figures", "captured", "small"]) == 2
    assert "no run of the table has the shares" in capsys.readouterr().err
    assert main(["figures", "claims", "small"]) == 0
    shown = capsys.readouterr().out
    assert "linear in ln Tr Π" in shown
    assert max(map(len, shown.splitlines())) <= 80


FAILS = '[defaults]\nmodel = "fc-6x1"\nepochs = 1\ntrain_samples = 5000\nseed = [0, 1]\n'


def test_a_sweep_of_which_every_run_failed_is_an_error_now_and_later(capsys):
    Path("all").write_text(FAILS)                                        # a configuration without a suffix
    for ran in (2, 0):
        assert main(["sweep", "all"]) == 1
        shown = capsys.readouterr()
        assert f"{ran} runs, {ran} of them failed, {2 - ran} recorded before; table: all-results/" in shown.out
        assert ("; errors: all-results/failed" in shown.out) == (ran > 0)
        assert shown.err == ("pkjax: error: all 2 runs of the sweep failed (ValueError: digits has 1437 examples in "
                             "this split, fewer than the 5000 wanted); --retry repeats them\n")
    assert main(["sweep", "all", "--output", "all"]) == 2
    assert "all is a file; name another folder" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["all", "all-results"]


def recorded_sweep(folder, runs=2, diverged=True):
    """Records of finished runs, the last of which diverged, as `pkjax sweep` writes them."""
    for number, chosen in enumerate(grid({"model": "fc-6x1", "seed": list(range(runs))})):
        bad = float("nan") if diverged and number == runs - 1 else 1.0
        row = {"test_accuracy": 0.5, "weight_change": bad, "output_norm": bad, "ln_trace_pi": bad}
        records.write_record(Path(folder), {
            "format": records.FORMAT, "key": chosen.key, "status": "done", "settings": chosen.to_dict(), "pruning":
            {"density": 1.0, "kept": 4, "layers": []}, "initial": {}, "spectra": None, "steps": 3, "seconds": 2.0,
            "history": [{"epoch": 0, **row}, {"epoch": 1, **row}]}, {"kernel": np.ones((2, 2), bool)})


@pytest.mark.parametrize("name", ["z[red]", "[bold]%s :bug:", "[]", "$x$"])
def test_names_are_printed_as_they_are(name, capsys):
    recorded_sweep(name)
    assert main(["figures", "3", name]) == 0
    assert capsys.readouterr().out == f"picture: {name}/figure-3.png\n"
    assert main(["figures", "claims", name]) == 0
    assert capsys.readouterr().out.endswith("\n1 diverged run left out\n")
    Path(f"{name}.toml").write_text('[defaults]\nmodel = "fc-6x1"\nseed = [0, 1]\n')
    assert main(["sweep", f"{name}.toml"]) == 0
    assert f"table: {name}/table.parquet\n" in capsys.readouterr().out
    assert main(["figures", "3", "[/red]"]) == 2
    assert "no records of runs in [/red]" in capsys.readouterr().err
    long = f"{'n' * 251}.npz"
    for file in (f"{name}.npz", long):
        assert main(["prune", *NET, "--pruner", "magnitude", "--output", file]) == 0
        assert f"masks: {file}\n" in capsys.readouterr().out
    assert not [file for file in os.listdir() if file.startswith(".")]


def test_errors_lose_their_frames_with_and_without_box_characters():
    for encoding in ("utf-8", "ascii"):
        done = run("prune", "--sampels", "3", PYTHONIOENCODING=encoding)
        assert done.stderr == ("pkjax: error: Unrecognized options: --sampels, 3; did you mean --samples "
                               "(see pkjax prune --help)\n")


def test_help_names_what_can_be_chosen(capsys):
    assert main(["--help"]) == main(["analyze", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for name in (*methods.MODELS, *methods.PRUNERS, *pk.data.names):
        assert re.search(rf"\b{name}\b", shown), name
    for option in ("--model", "--data", "--pruner", "--compression", "--samples", "--seed", "--output", "--masks"):
        assert option in shown


def test_as_a_program():
    assert run("--version").stdout == f"pkjax {pk.__version__}\n"
    bad = run("prune", "--pruner", "oracle")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
