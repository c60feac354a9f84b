"""Notebooks run from top to bottom in a small setting, show what is true, and hold the outputs of their own source."""

import ast
import base64
import io
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from tests.house.test_docs import ROOT, assert_same

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
Image = pytest.importorskip("PIL.Image")

from notebooks import refresh  # noqa: E402

FOLDER = ROOT / "notebooks"
SMALL = {
    "1_prune_in_your_own_loop": {"WIDTH": 15, "STEPS": 40, "SEEDS": 2, "COMPRESSIONS": [0.5, 1.0]},
    "2_what_a_path_kernel_is": {"NETWORKS": 12},
    "3_ntk_against_path_kernel": {"WIDTH": 12, "DEPTH": 2, "SAMPLES": 3, "SEEDS": 3, "COMPRESSIONS": [0.5]},
    "4_forecasting_convergence": {"SAMPLES": 4, "STEPS": 60, "NARROW": 6, "WIDE": 150, "WIDTH": 12, "SEEDS": 2,
                                "COMPRESSIONS": [0.5, 1.0]},
    "5_paths_through_a_transformer": {"WIDTH": 12, "DEPTH": 1, "HEADS": 3, "COMPRESSION": 0.5, "STEPS": 10},
}
"""What replaces the constants in the cell tagged "parameters" of each notebook."""


def read(name, kind="py"):
    return jupytext.read(FOLDER / f"{name}.{kind}")


def shrunk(name, kind="py"):
    """The notebook with small numbers in place of its constants, of which none may be forgotten."""
    notebook = read(name, kind)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    named = {target.id for node in ast.parse(cell.source).body for target in ast.walk(node)
             if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    assert named == set(SMALL[name])
    cell.source = "\n".join(f"{constant} = {value!r}" for constant, value in SMALL[name].items())
    return notebook


@pytest.fixture
def run():
    """Run a notebook's source as a reader does, cell by cell, in JAX's own type promotion."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    def execute(name):
        scope = {"__name__": "__main__"}
        for number, cell in enumerate(shrunk(name).cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}.py, cell {number}", "exec"), scope)
        return scope

    precision = jax.config.jax_default_matmul_precision
    with jax.numpy_dtype_promotion("standard"):
        yield execute
    jax.config.update("jax_default_matmul_precision", precision)
    pyplot.close("all")


def nonzero(tree):
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree) if np.ndim(leaf) > 1)


def pictures(cell):
    """The pictures among a cell's outputs."""
    return [Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]


def draws(source):
    """Whether a cell's code draws a picture."""
    return "plt.subplots" in source or source.startswith("pk.plots")


def drawn(figure):
    """The figure is drawn without a warning, and none of its panels is empty."""
    figure.canvas.draw()
    assert all(ax.lines or ax.collections or ax.images or ax.patches for ax in figure.axes)
    return figure.axes


def test_every_notebook_is_known_and_a_pair():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(refresh.NAMES) == set(SMALL)
    assert {file.stem for file in FOLDER.glob("*.py")} == {*SMALL, "refresh"}


@pytest.mark.parametrize("name", SMALL)
def test_source_and_notebook_agree(name):
    source, notebook = read(name), read(name, "ipynb")
    assert [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in source.cells] == [
        (cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]
    assert notebook.metadata.kernelspec.name == "python3"
    kinds = [output.output_type for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "error" not in kinds


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_holds_the_outputs_of_its_own_source(name):
    notebook = read(name, "ipynb")
    assert notebook.metadata.pkjax.outputs_of == refresh.digest(read(name)), (
        f"{name}.py has changed since its outputs were stored: python -m notebooks.refresh {name}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert bool(pictures(cell)) == draws(cell.source), cell.source
        assert any(output.get("name") == "stdout" for output in cell.outputs) or "print(" not in cell.source \
            or "google.colab" in cell.source, cell.source
    assert draws(code[-1].source)


@pytest.mark.parametrize("name", SMALL)
def test_a_stored_notebook_is_small_and_the_same_whenever_and_wherever_it_is_run(name):
    file = FOLDER / f"{name}.ipynb"
    assert file.stat().st_size < 400_000
    machine = ("/home/", "/root/", "/tmp/", "/usr/", "site-packages", str(ROOT))
    assert not any(path in file.read_text() for path in machine)
    notebook = nbformat.read(file, 4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "pkjax"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr"
            assert not output.get("metadata")
        for picture in pictures(cell):
            assert picture.mode == "P"
            assert not picture.info
            assert picture.width < 1700


def test_other_code_has_another_digest_and_other_words_do_not():
    notebook = read("2_what_a_path_kernel_is")
    before = refresh.digest(notebook)
    notebook.cells[0].source += " More words."
    assert refresh.digest(notebook) == before
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source += "\n1"
    assert refresh.digest(notebook) != before


def test_a_notebook_that_does_not_exist_is_named():
    with pytest.raises(SystemExit, match="no notebook is named 5_more; there are 1_prune"):
        refresh.main(["5_more"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_warnings_with_their_paths_are_not_stored():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import warnings; warnings.warn('old')")])
    with pytest.raises(RuntimeError, match="writes to the standard error"):
        refresh.run(notebook)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_installs_pkjax_on_colab_alone_from_an_archive_where_there_is_one(name, monkeypatch, tmp_path):
    (cell,) = [cell for cell in read(name).cells if "pip" in cell.source and cell.cell_type == "code"]
    called, code = [], 0

    def install(command, **_):
        called.append(command)
        return types.SimpleNamespace(returncode=code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", install)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    exec(cell.source, {})
    assert not called
    google = types.ModuleType("google")
    google.colab = types.ModuleType("google.colab")
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", google.colab)
    exec(cell.source, {})
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert called == [[*pip, "pkjax[data,plots]"]]
    code = 1
    with pytest.raises(SystemExit, match="upload the repository as an archive"):
        exec(cell.source, {})
    code = 0
    archive = tmp_path / "pkjax-main (1).zip"
    archive.touch()
    exec(cell.source, {})
    assert called[-1] == [*pip, f"pkjax[data,plots] @ {archive.as_uri()}"]


@pytest.mark.slow
def test_pruning_in_a_loop_of_ones_own_keeps_what_the_masks_keep(run, capsys):
    scope = run("1_prune_in_your_own_loop")
    small, pruned = SMALL["1_prune_in_your_own_loop"], scope["pruned"]
    assert pruned.kept == round(pruned.total / 10)
    assert nonzero(scope["moments"]) <= nonzero(scope["theta"]) == pruned.kept
    for tree in (scope["theta"], scope["moments"]):
        assert nonzero(jax.tree.map(lambda leaf, mask: np.where(mask, 0, leaf), tree, pruned.masks)) == 0
    assert scope["same"]
    assert nonzero(scope["loaded"]) == pruned.kept + sum(mask.size for mask in jax.tree.leaves(pruned.masks)
                                                         if mask.ndim > 1) - pruned.total
    assert scope["nnx_kept"] == scope["nnx_pruned"].kept == round(scope["nnx_pruned"].total / 10)
    assert scope["kept_last"].masks[2]["w"].all()
    assert scope["kept_last"].total == 64 * 15 + 15 * 15
    total = 64 * 15 + 15 * 15 + 15 * 10
    assert set(scope["counts"].values()) == {round(total / 100)}
    assert min(scope["layers_kept"][100]) > 0
    for (_, rho), kept in scope["kept"].items():
        assert kept == [round(total * 10**-rho)] * small["SEEDS"]
    assert len(scope["kept"]) == 6 * 2
    losses = np.asarray(scope["dense_losses"])
    assert (losses[:, -5:].mean(1) < losses[:, :5].mean(1)).all()
    left, right = drawn(scope["figure"])
    assert [text.get_text() for text in left.get_legend().get_texts()][-1] == "SynFlow-L2"
    assert len(right.patches) == 9
    printed = capsys.readouterr().out
    assert "NOT" not in printed
    assert "masks in 'masks.npz' are of another network" in printed


@pytest.mark.slow
def test_the_path_kernel_by_hand_is_the_one_by_polynomial_and_its_theorem_ends_where_it_does(run):
    scope = run("2_what_a_path_kernel_is")
    factors = scope["factors"]
    assert len(factors.paths) == 18
    assert scope["active"].sum(1).tolist() == [12, 12, 6]
    np.testing.assert_allclose(scope["path_sum"], scope["outputs"], atol=1e-14)
    np.testing.assert_allclose(scope["product"], scope["theta"], atol=1e-13)
    np.testing.assert_allclose(scope["G"], factors.jtv.T @ factors.jtv, atol=1e-13)
    np.testing.assert_allclose(scope["from_paths"], scope["from_polynomial"], atol=1e-13)
    report = scope["report"]
    np.testing.assert_allclose(report.lam[:2], [2, 2])
    np.testing.assert_allclose(report.nu[:2] * report.pi[:2], [4, 1])
    assert {name for name, claim in report.claims.items() if not claim.holds} == {
        "per index", "per index, σ for ν", "total, σ for ν"}
    np.testing.assert_allclose(scope["overlaps"], [[0, 1], [1, 0]], atol=1e-12)
    assert not scope["broken"][1.0].any()
    assert scope["broken"][0.1].any()
    assert all(scope["sums_hold"].values())
    assert scope["ratios"][1.0].shape == (12, 32)
    assert len(drawn(scope["figure"])) == 3


@pytest.mark.slow
def test_the_ntk_beside_the_path_kernel_keeps_every_theorem(run):
    scope = run("3_ntk_against_path_kernel")
    small, pruned = SMALL["3_ntk_against_path_kernel"], scope["pruned"]
    assert pruned.kept == round(pruned.total / 10)
    for report in scope["reports"].values():
        assert all(claim.holds for claim in report.claims.values() if claim.proven)
        assert all(check.passed for check in report.checks.values())
        assert 0 < report.captured <= 1 + 1e-6
    networks = scope["networks"]
    assert len(networks) == small["SEEDS"] * (1 + 4)
    dense = next(network for network in networks if network["pruner"] == "dense")
    np.testing.assert_allclose([dense["Tr Θ"], dense["Tr Π"], dense["gated trace"]],
                               [getattr(scope["reports"]["dense"], name) for name in
                                ("trace_ntk", "trace_pi", "gated_trace")], rtol=1e-4)
    assert all((np.diff(network["lam"]) <= 0).all() for network in networks)
    assert np.abs(list(scope["correlations"].values())).max() <= 1
    assert scope["correlations"]["gated trace"][0] > 0.5
    drawn(scope["figure"])


@pytest.mark.slow
def test_the_linearised_network_forecasts_the_wide_one_and_one_exponential_does_not(run):
    scope = run("4_forecasting_convergence")
    small = SMALL["4_forecasting_convergence"]
    np.testing.assert_allclose(scope["left"][small["STEPS"] // 10], scope["closed"], atol=1e-4)
    assert scope["gaps"][small["WIDE"]] < scope["gaps"][small["NARROW"]]
    assert scope["gaps"][small["WIDE"]] < 0.2
    np.testing.assert_allclose(scope["flow"].loss, scope["real_losses"], rtol=0.2)
    assert scope["r2_in_time"] <= max(scope["fits"]) <= 1
    assert len(scope["table"]) == small["SEEDS"] * (1 + 3 * 2)
    assert all(score <= 1 + 1e-6 for scores in scope["scores"].values() for score in scores.values())
    assert all(row["early"] < row["late"] for row in scope["table"])
    assert len(drawn(scope["figure"])) == 3


@pytest.mark.slow
def test_the_paths_of_a_transformer_are_as_many_as_the_formula_says_and_its_branches_conserve_their_flow(run):
    pytest.importorskip("pandas")
    scope = run("5_paths_through_a_transformer")
    assert scope["absent"] == ["blocks/0/attention/key/kernel", "blocks/0/attention/query/kernel"]
    width, tokens, hidden = 12, 17, 48

    def behind_norm(n):
        return (width + 1) * n + 1

    through = width * (width * (behind_norm(2) + 16 * behind_norm(2 * 2 + 2)) + tokens) + 1
    ends = 2 + through + hidden * (width * behind_norm(2 + through) + 1) + 1
    np.testing.assert_allclose(scope["log10_paths"], np.log10(10 * (width * behind_norm(ends) + 1)), atol=1e-4)
    for flow, _ in [(scope["dense_flow"], 0), *scope["left"].values()]:
        np.testing.assert_allclose(flow[[1, 3, 5]], [flow[2], flow[4], 1], rtol=1e-4)     # biases are 0
    total = width * (4 + 2 * width + 2 * hidden + 10)
    assert {(result.kept, result.total) for result in scope["pruned"].values()} == {(round(total * 10**-0.5), total)}
    drawn(scope["figure"])


def text(output):
    """What an output says, but for JAX's version and the device."""
    lines = output.get("text", output.get("data", {}).get("text/plain", "")).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("JAX ", "<Figure size")))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")      # what Jupyter's own packages warn of is theirs
@pytest.mark.parametrize("name", SMALL)
def test_the_outputs_that_a_notebook_holds_come_out_again(name):
    stored, anew = nbformat.read(FOLDER / f"{name}.ipynb", 4), refresh.refreshed(name)
    assert [cell.id for cell in stored.cells] == [cell.id for cell in anew.cells]
    for before, now in zip(stored.cells, anew.cells, strict=True):
        assert [output.output_type for output in before.get("outputs", ())] == [
            output.output_type for output in now.get("outputs", ())]
        assert [picture.mode for picture in pictures(before)] == [picture.mode for picture in pictures(now)]
        for shown, printed in zip(before.get("outputs", ()), now.get("outputs", ()), strict=True):
            assert_same(text(printed), text(shown), rtol=0.1, atol=0.02)     # trained networks amplify rounding
