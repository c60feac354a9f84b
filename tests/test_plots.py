"""Pictures show the report's numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_drawing_needs_no_pyplot_and_names_its_extra():
    code = "import sys; sys.modules['matplotlib.figure'] = None; import pkjax.plots as p; p.spectra(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'pkjax[plots]'" in done.stderr
    code = "import sys, pkjax.plots as p, tests.fake_report as f; p.report(f.report()); " \
           "sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
