"""Pictures show the report's numbers."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import plots

from tests.fake_report import report as fake


@pytest.mark.parametrize("pruned", [False, True])
def test_spectra_are_drawn_as_they_are(pruned):
    report = fake(pruned=pruned)
    (axes,) = plots.spectra(report).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    drawn = [next(y for label, y in lines.items() if key in label) for key in ("lambda", "nu_i$ of", "pi_i$ of")]
    for want, got in zip((report.lam, report.nu, report.pi), drawn, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(next(y for label, y in lines.items() if "bound" in label),
                                  report.nu * report.pi)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_zero_eigenvalues_and_short_lists_can_be_drawn(tmp_path):
    report = fake(n=20, k=1)
    report.lam[10:] = 0
    report.lam[15:] = -1e-9
    report.nu[:] = np.nextafter(0, 1)
    (axes,) = plots.spectra(report).axes
    assert len(axes.lines[1].get_ydata()) == 10
    axes.figure.savefig(tmp_path / "short.png")


def test_cells_of_the_overlaps_add_up_to_the_share_of_the_trace():
    report = fake(n=320, k=100)
    figure = plots.overlaps(report)
    (mesh,) = figure.axes[0].collections
    weights = report.nu[:, None] * report.pi * report.overlaps**2 / report.trace_ntk
    cells = np.ma.getdata(mesh.get_array())
    assert cells.size < 41**2
    floor = cells.max() * 1e-4
    assert abs(cells.sum() - weights.sum()) <= floor * cells.size
    assert abs(cells.flat[0] - weights[0, 0]) <= floor       # the first pair has a cell of its own


def test_reports_without_overlaps_say_so():
    (axes,) = plots.overlaps(fake(overlaps=False)).axes
    assert axes.texts[0].get_text() == "no pair of eigenvectors carries anything"


def test_bars_are_the_kept_shares_and_emptied_layers_are_named():
    report = fake(pruned=True)
    (axes,) = plots.layers(report).axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches],
                               [layer.kept / layer.total for layer in report.layers])
    assert [text.get_text() for text in axes.texts].count("empty") == 1
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [layer.name for layer in report.layers]


def test_a_report_is_one_figure_and_given_axes_are_used(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plots.spectra(fake(), axes) is axes.figure
    figure = plots.report(fake(pruned=True), title="pruned")
    assert len(figure.axes) == 4                             # three panels and a colour bar
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def factors(skip=False):
    """One hidden layer of two units with biases; the second unit is shut for the example."""
    def net(w, x):
        hidden = jnp.maximum(x @ w["a"]["kernel"] + w["a"]["bias"], 0.0)
        return hidden @ w["b"]["kernel"] + (x if skip else 0.0)
    w = {"a": {"kernel": jnp.array([[1.0, -2.0], [0.5, -1.0]]), "bias": jnp.array([1.0, -1.0])},
         "b": {"kernel": jnp.array([[3.0, -1.0], [2.0, 4.0]])}}
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), w)
    masks["a"]["kernel"] = jnp.array([[True, True], [True, False]])
    return pk.paths.factorize(net, w, jnp.array([[1.0, 2.0]]), masks=masks)


def test_every_path_is_drawn_in_its_colour_from_its_source_to_its_output():
    f = factors()
    active = (f.jvf != 0).any(axis=0)
    axes = plots.paths(f.paths, f.values, active, limit=8.0).axes[0]
    drawn = {p: [line for line in axes.lines if line.get_gid() == f"path {p}"] for p in range(len(f.paths))}
    assert len(f.paths) == 10                       # five edges and biases into two units with two edges out of each
    assert all(len(lines) == 2 for lines in drawn.values())
    assert active.sum() == 6
    assert axes.get_title(loc="left") == "10 paths, 6 active"
    for p, path in enumerate(f.paths):
        first, last = sorted(drawn[p], key=lambda line: line.get_xdata()[1])
        assert first.get_color() == last.get_color()
        assert (first.get_linestyle() == "-") == active[p] == ("[1]" not in path.parameters[0]
                                                               and ",1]" not in path.parameters[0])
        height = {0: 0.5, 1: -0.5}
        assert abs(last.get_ydata()[1] - height[path.output]) < 0.15
        if path.source is not None:
            assert abs(first.get_ydata()[0] - height[path.source]) < 0.15
        if active[p]:
            red, _, blue, _ = first.get_color()
            assert (red > blue) == (f.values[p] > 0)
    markers = [line.get_marker() for line in axes.lines if line.get_marker() != "None"]
    assert (markers.count("o"), markers.count("s")) == (6, 2)
    assert [text.get_text() for text in axes.texts] == ["$x_{1}$", "$x_{2}$", "$f_{1}$", "$f_{2}$"]


def test_paths_that_cannot_be_drawn_are_errors():
    f = factors()
    with pytest.raises(ValueError, match="got 9 and 10 for 10 paths"):
        plots.paths(f.paths, f.values[1:])
    f = factors(skip=True)
    with pytest.raises(ValueError, match=r"but one runs from input 0 over $"):
        plots.paths(f.paths, f.values)


def test_drawing_needs_no_pyplot_and_names_its_extra():
    code = "import sys; sys.modules['matplotlib.figure'] = None; import pkjax.plots as p; p.spectra(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'pkjax[plots]'" in done.stderr
    code = "import sys, pkjax.plots as p, tests.fake_report as f; p.report(f.report()); " \
           "sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
