"""Pictures show the report's numbers."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from matplotlib.text import Text
from pkjax import plots
from pkjax.analysis.comparison import Row
from pkjax.pruning.result import LayerReport

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


def test_names_of_layers_are_no_formulae(tmp_path):
    names = [r"$\frac$", r"a\$b$", "50% {x}"]
    report = dataclasses.replace(fake(), layers=tuple(pk.LayerReport(name, (2, 2), 1, 4, False) for name in names))
    figure = plots.layers(report)
    figure.savefig(tmp_path / "layers.png", dpi=40)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        r"\$\frac\$", r"a\\$b\$", "50% {x}"]


def test_a_report_is_one_figure_and_given_axes_are_used(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plots.spectra(fake(), axes) is axes.figure
    figure = plots.report(fake(pruned=True), title="pruned")
    assert len(figure.axes) == 4                             # three panels and a colour bar
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_of_several_panels_take_as_many_axes():
    figure = column(3)
    assert plots.report(fake(), axes=np.array(figure.axes)) is figure
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["Eigenvalues", "Share of Tr Θ, in all 20.7 %",
                                                                    "Weights kept"]
    with pytest.raises(ValueError, match="a report is drawn on 3 panels, but 2 axes were received"):
        plots.report(fake(), axes=column(2).axes)
    with pytest.raises(ValueError, match=r"ax must be the axes of one panel, .* but Figure was received"):
        plots.spectra(fake(), figure)


def test_a_network_pruned_to_nothing_can_be_drawn(tmp_path):
    report = fake(pruned=True, overlaps=False)
    nothing = dataclasses.replace(
        report, lam=0 * report.lam, nu=0 * report.nu, pi=0 * report.pi, trace_ntk=0.0,
        layers=tuple(dataclasses.replace(layer, kept=0, emptied=True) for layer in report.layers))
    figure = plots.report(nothing)
    said = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert said == ["all eigenvalues are zero", "no pair of eigenvectors carries anything"] + 7 * ["empty"]
    figure.savefig(tmp_path / "nothing.png")
    only = dataclasses.replace(report, pi=0 * report.pi)
    labels = [text.get_text() for text in plots.spectra(only).axes[0].get_legend().get_texts()]
    assert [label.endswith(": all zero") for label in labels] == [True, False, False, True]


def test_nothing_is_cut_off_or_overlaps_at_the_width_of_a_column():
    layers = tuple(LayerReport(f"stage{i // 9}_block{i % 9}_convolution/kernel", (3, 3, 64, 64), i * 600, 36_864, not i)
                   for i in range(60))
    for report in (fake(), fake(n=20, k=1), fake(n=3, k=2), dataclasses.replace(fake(), layers=layers)):
        for draw in (plots.spectra, plots.overlaps, plots.layers):
            figure = column(1)
            (ax,) = figure.axes
            draw(report, ax)
            figure.draw_without_rendering()
            page = figure.bbox
            title = ax.get_title(loc="left")
            titles = [text for text in ax.findobj(Text) if text.get_text() == title]
            assert title
            named = [label for label in ax.get_yticklabels() if label.get_text()]
            labels = [label for label in (ax.xaxis.label, ax.yaxis.label) if label.get_text()]
            for text in (*titles, *labels, *ax.texts, *named):
                box = text.get_window_extent()
                assert box.x0 >= -1, text.get_text()
                assert box.x1 <= page.x1 + 1, text.get_text()
            if draw is plots.layers:
                boxes = sorted((label.get_window_extent() for label in named), key=lambda box: box.y0)
                assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(names)) == len(names) < 60
    assert ax.get_title(loc="left") == f"Least kept, {len(names)} of 60 layers"


def test_a_training_of_no_epoch_says_so():
    (ax,) = plots.training([{"epoch": 0}]).axes
    assert ax.texts[0].get_text() == "no epoch yet"


def column(panels):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3, 2.5 * panels), layout="constrained")
    figure.subplots(panels, 1)
    return figure


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
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


def test_a_notebook_shows_the_figure_that_is_returned():
    from IPython.core.formatters import DisplayFormatter

    shown, size = DisplayFormatter().format(plots.spectra(fake()))
    assert shown["image/png"].startswith(b"\x89PNG")
    assert size["image/png"]["width"] > size["image/png"]["height"] > 100


def made_up(count=3):
    """A comparison of two pruners and the dense network, with power laws for spectra."""
    rows, spectra = [], {}
    for i, key in enumerate([("dense", 0.0, 0), ("dense", 0.0, 1), *(
            (name, float(ρ), seed) for ρ in range(1, count) for name in ("snip", "synflow") for seed in range(3))]):
        lam = 10.0**(4 - i / 3) * np.arange(1.0, 21 - i % 3) ** -1.5
        spectra[key] = lam
        rows.append(Row(*key, parameters=9, connected=True, trace_pi=2.0**-i, gated_trace=1.0, trace_ntk=lam.sum(),
                        nu_pi=np.nan, nu_pi_upper=np.nan, largest=lam[0], effective_rank=lam.sum()**2 / (lam**2).sum(),
                        decay=1.5, log10_trace_pi=-i * np.log10(2), log10_gated_trace=0.0, error=0.0, note=""))
    return pk.Comparison(rows=tuple(rows), spectra=spectra, samples=2, outputs=10, dtype="float32")


def test_a_comparison_draws_medians_bands_traces_and_correlations(tmp_path):
    result = made_up()
    figure = plots.compare(result, "what [it] $shows$")
    *above, total, largest, decay, correlations = figure.axes
    assert [ax.get_title(loc="left") for ax in above] == ["λ of Θ, ρ = 1", "λ of Θ, ρ = 2"]
    for ax, compression in zip(above, (1.0, 2.0), strict=True):
        dense, snip, _ = ax.lines
        each = [result.spectra["snip", compression, seed] for seed in range(3)]
        common = min(map(len, each))
        np.testing.assert_allclose(snip.get_ydata(), np.median([lam[:common] for lam in each], axis=0))
        np.testing.assert_allclose(dense.get_ydata()[0], np.mean([result.spectra["dense", 0.0, s][0] for s in (0, 1)]))
        band = ax.collections[1].get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([band.max(), band.min()], [max(lam[0] for lam in each),
                                                              min(lam[common - 1] for lam in each)])
    for ax, name in ((total, "trace_ntk"), (largest, "largest"), (decay, "decay")):
        points = np.concatenate([c.get_offsets() for c in ax.collections])
        np.testing.assert_allclose(points, [[row.trace_pi, getattr(row, name)] for row in result.rows])
    drawn = {line.get_xdata()[0] for line in correlations.lines if len(line.get_xdata()) == 1}
    wanted = {c.value for table in result.correlations.values() for c in table["trace_pi"].values()}
    assert drawn == wanted
    figure.savefig(tmp_path / "comparison.png")


def test_a_comparison_of_nothing_says_so_and_many_compressions_share_four_panels(tmp_path):
    row = made_up().rows[0]._replace(name="cut", compression=None, connected=False)
    nothing = pk.Comparison(rows=(row,), spectra={row[:3]: np.zeros(0)}, samples=2, outputs=1, dtype="float32")
    figure = plots.compare(nothing)
    assert [ax.texts[0].get_text() for ax in figure.axes] == [
        "inputs reach no output", *["nothing to compare"] * 3, "fewer than three networks to a group"]
    figure.savefig(tmp_path / "nothing.png")
    assert len(plots.compare(made_up(8)).axes) == 8
    with pytest.raises(ValueError, match="drawn on 6 panels, but 2 axes were received"):
        plots.compare(made_up(), axes=figure.axes[:2])
    assert plots.compare(made_up(), axes=plots.compare(made_up()).axes).axes
