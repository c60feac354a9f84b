"""Figures and tables of a sweep show the runs' numbers, and their fits are least squares."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
from pkjax.experiments import figures, findings, regression
from pkjax.experiments.figures.styles import STYLES, styles_of
from pkjax.experiments.paper_claims import judge_claims
from pkjax.experiments.run_tables import PREDICTORS, QUANTITIES
from pkjax.plots import panels
from scipy import optimize, stats

from tests.cases import unchecked

DRAW = {"figure1": figures.figure1, "figure2": figures.figure2, "figure3": figures.figure3,
        "predictors": figures.predictors, "captured": figures.captured}
TABLES = {"fits": findings.fits, "predictor_scores": findings.predictor_scores, "claims": judge_claims}
ALL = DRAW | TABLES
ETA, T, A, B = 0.01, 0.7, 9.0, 2.0


def sweep(models=("fc-100", "fc-500"), pruners=tuple(STYLES), compressions=(0.5, 1.5, 3.0), seeds=2, data="mnist",
          noise=0.3):
    random = np.random.default_rng(0)
    rows = []
    for number, model in enumerate(models):
        for pruner in pruners:
            for compression in (0.0,) if pruner == "none" else compressions:
                for seed in range(seeds):
                    ln_trace = 8 - 1.5 * compression + random.normal()
                    rate = ETA * np.exp(ln_trace)
                    level = (number + 1) * A
                    spread = noise * (0.1 if "l2" in pruner else 1.0)
                    rows.append({
                        "model": model, "data": data, "pruner": pruner, "compression": compression, "seed": seed,
                        "epochs": 5, "steps": 2345, "learning_rate": ETA, "density": 10**-compression,
                        "test_accuracy": 0.9 - 0.05 * compression + 0.001 * random.normal()
                        - 0.03 * ("dist" in pruner) + 0.1 * (number - 0.5) * ("l2" in pruner),
                        "train_accuracy": 0.95, "trace_pi": np.exp(ln_trace + 0.1 * random.normal()),
                        "trace_pi_1": np.exp(ln_trace), "gated_trace": np.exp(ln_trace + random.normal()),
                        "trace_ntk": np.exp(ln_trace + 2 + random.normal()), "bound": np.exp(ln_trace + 5),
                        "weight_change": level * (1 - np.exp(-rate * T)) + spread * random.normal(),
                        "output_norm": 2 * level * (1 - np.exp(-rate * T)) + B * np.exp(-rate * T)
                        + spread * random.normal(), "output_change": 1.0,
                        "captured": list(np.cumsum(random.uniform(0, 0.05, 12))), "status": "finished"})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table():
    return sweep()


def named(ax):
    """The lines of an axes by their labels without numbers."""
    return {style.label: line for style in STYLES.values() for line in ax.lines
            if str(line.get_label()).rsplit(" ", 1)[0] == style.label or line.get_label() == style.label}


def text(figure):
    return figure.get_supxlabel().replace("\n", " ")


# Regression


def ranks(values):
    """The number of smaller values plus half that of equal ones: ties share their mean rank."""
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def test_the_line_is_least_squares_and_spearmans_rho_is_the_correlation_of_ranks():
    random = np.random.default_rng(1)
    x, y = np.exp(random.normal(size=50) * 20), random.normal(size=50)
    fit = regression.line(x, y)
    np.testing.assert_allclose(fit[:2], np.polyfit(np.log(x), y, 1), rtol=1e-9)
    residuals = y - fit.intercept - fit.slope * np.log(x)
    np.testing.assert_allclose(fit.r2, 1 - np.sum(residuals**2) / np.sum((y - y.mean())**2), rtol=1e-10)
    assert fit[3:] == (50, 0)
    tied = np.round(y)
    assert len(set(tied)) < len(tied)
    want = np.corrcoef(ranks(x), ranks(tied))[0, 1]
    np.testing.assert_allclose(regression.spearman(x, tied), want)


def test_points_without_a_logarithm_or_a_value_are_counted_and_change_nothing():
    x, y = np.array([1., 4., 9., 20.]), np.array([1., 2., 5., 4.])
    bad = np.array([0., -3., np.nan, np.inf, 7., 8.]), np.array([1., 1., 1., 1., np.nan, np.inf])
    found, want = regression.line(np.append(x, bad[0]), np.append(y, bad[1])), regression.line(x, y)
    assert found[:4] == want[:4]
    assert found.left_out == 6
    assert regression.spearman(np.append(x, bad[0]), np.append(y, bad[1])) == regression.spearman(x, y)


@pytest.mark.parametrize(("x", "y"), [([], []), ([2.], [3.]), ([2., 3.], [3., 4.]), ([2., 2., 2.], [1., 2., 3.])])
def test_fewer_than_three_traces_determine_no_line_and_no_curve(x, y):
    assert np.isnan(regression.line(x, y)[:3]).all()
    assert np.isnan(regression.spearman(x, y))
    assert not regression.saturation(x, y, ETA, start=True).drawn


def test_equal_values_have_a_line_without_an_r2():
    found = regression.line([1., 2., 3.], [4., 4., 4.])
    assert found[:2] == (0.0, 4.0)
    assert np.isnan(found.r2)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("t", [1e-7, 0.3, 2e5])
def test_the_curve_is_recovered_from_its_points_over_many_decades(start, t):
    rate = np.geomspace(1e-3, 1e3, 40) / t
    b = B if start else 0.0
    fit = regression.saturation(rate / ETA, A * (1 - np.exp(-rate * t)) + b * np.exp(-rate * t), ETA, start=start)
    np.testing.assert_allclose([fit.a, fit.b, fit.t, fit.r2], [A, b, t, 1.0], rtol=1e-6, atol=1e-9)
    assert not fit.at_bound
    assert fit.drawn


def test_the_effective_time_of_noisy_points_is_the_best_of_a_nonlinear_fit():
    random = np.random.default_rng(2)
    trace, eta = np.exp(random.normal(size=60) * 2 + 4), random.choice([0.01, 0.02], size=60)
    y = A * (1 - np.exp(-eta * trace * T)) + B * np.exp(-eta * trace * T) + 0.3 * random.normal(size=60)
    fit = regression.saturation(trace, y, eta, start=True)
    best = optimize.least_squares(lambda p: p[0] * (1 - np.exp(-eta * trace * p[2])) + p[1] * np.exp(
        -eta * trace * p[2]) - y, [A, B, T], xtol=1e-14, ftol=1e-14, gtol=1e-14)
    np.testing.assert_allclose([fit.a, fit.b, fit.t], best.x, rtol=1e-4)
    np.testing.assert_allclose(np.sum(fit.residuals**2), 2 * best.cost, rtol=1e-10)


def test_for_a_given_time_a_and_b_are_least_squares():
    random = np.random.default_rng(3)
    trace, y = np.geomspace(1, 1e3, 20), random.normal(size=20)
    fit = regression.saturation(trace, y, ETA, t=3, start=True)
    e = np.exp(-ETA * trace * 3)
    np.testing.assert_allclose([fit.a, fit.b], np.linalg.lstsq(np.stack([1 - e, e], 1), y)[0])
    np.testing.assert_allclose(fit.residuals, y - fit.a * (1 - e) - fit.b * e)
    assert fit.t == 3


def test_where_the_exponential_has_vanished_the_curve_is_the_mean_and_b_unknown():
    y = np.array([1., 2., 6.])
    fit = regression.saturation([1e5, 1e6, 1e7], y, ETA, t=46_900., start=True)
    assert fit.a == pytest.approx(3.0)
    assert np.isnan(fit.b)
    np.testing.assert_allclose(fit.residuals, y - 3.0)
    assert regression.risen([1e3], fit.a, fit.b, fit.t) == pytest.approx(3.0)


def test_straight_and_constant_points_put_the_time_at_a_bound():
    trace = np.geomspace(1, 1e3, 30)
    assert regression.saturation(trace, 2 * trace, ETA).at_bound
    assert regression.saturation(trace, np.full(30, 5.0), ETA).at_bound


@pytest.mark.parametrize("t", [0, -1.0, np.nan, np.inf])
def test_a_time_is_positive(t, table):
    with pytest.raises(ValueError, match="positive number of steps"):
        figures.figure1(table, t=t)


# Figures


def test_figure_1_shows_every_run_its_fitted_curve_and_each_pruners_distance(table):
    figure = figures.figure1(table)
    assert len(figure.axes) == 4
    for ax, (model, quantity) in zip(figure.axes, [(m, q) for m in ("fc-100", "fc-500")
                                                   for q in ("weight_change", "output_norm")], strict=True):
        some = table[table["model"] == model]
        fit = regression.saturation(some["trace_pi_1"], some[quantity], ETA, start=quantity == "output_norm")
        (curve,) = (line for line in ax.lines if line.get_label() == "_curve")
        x, y = curve.get_data()
        np.testing.assert_allclose(y, fit.a * (1 - np.exp(-ETA * x * fit.t)) + fit.b * np.exp(-ETA * x * fit.t))
        assert (x[0], x[-1]) == pytest.approx((some["trace_pi_1"].min(), some["trace_pi_1"].max()))
        for pruner, style in STYLES.items():
            here = (some["pruner"] == pruner).to_numpy()
            line = named(ax)[style.label]
            np.testing.assert_array_equal(line.get_xydata(), some.loc[here, ["trace_pi_1", quantity]])
            assert float(line.get_label().rsplit(" ", 1)[1]) == pytest.approx(
                np.sqrt(np.mean(fit.residuals[here]**2)), rel=5e-3)
        assert f"t = {fit.t:.3g} (fitted)" in ax.get_title("left")
        assert ax.get_xscale() == "log"
    assert "2,345 steps" in text(figure)


def test_figure_1_at_the_true_number_of_steps_is_flat(table):
    figure = figures.figure1(table.assign(learning_rate=0.1), t=234_500)
    for ax in figure.axes:
        (curve,) = (line for line in ax.lines if line.get_label() == "_curve")
        np.testing.assert_allclose(np.ptp(curve.get_ydata()), 0, atol=1e-6)
        assert "t = 234,500 (given)" in ax.get_title("left")
    assert "b = –" in figure.axes[1].get_title("left")


def test_two_learning_rates_have_two_curves(table):
    half = np.where(table["seed"] == 0, ETA, 2 * ETA)
    for ax in figures.figure1(table.assign(learning_rate=half)).axes:
        assert [line.get_label() for line in ax.lines].count("_curve") == 2


def test_figure_2_draws_the_lines_of_its_table(table):
    found = findings.fits(table).set_index(["model", "quantity"])
    for ax, quantity in zip(figures.figure2(table).axes, QUANTITIES, strict=True):
        labels = ax.get_legend_handles_labels()[1]
        for model, label in zip(("fc-100", "fc-500"), labels, strict=True):
            some = table[table["model"] == model]
            want = stats.linregress(np.log(some["trace_pi"]), some[quantity])
            row = found.loc[(model, quantity)]
            np.testing.assert_allclose(row[["slope", "intercept", "r2"]].astype(float),
                                       [want.slope, want.intercept, want.rvalue**2])
            (line,) = (line for line in ax.lines if line.get_label() == f"_{model}")
            np.testing.assert_allclose(line.get_ydata(), want.intercept + want.slope * np.log(line.get_xdata()))
            (points,) = (line for line in ax.lines if line.get_label() == label)
            np.testing.assert_array_equal(points.get_xydata(), some[["trace_pi", quantity]])
            assert f"R² {want.rvalue**2:.2f}, slope {want.slope:.3g} (n = {len(some)})" in label


def test_figure_3_draws_means_over_seeds_their_range_and_the_dense_level(table):
    figure = figures.figure3(table)
    assert [ax.get_title("left") for ax in figure.axes] == ["fc-100, mnist", "fc-500, mnist"]
    for ax, model in zip(figure.axes, ("fc-100", "fc-500"), strict=True):
        some = table[table["model"] == model]
        cells = some.pivot(columns="seed", index=["pruner", "compression"], values="test_accuracy")
        lines = named(ax)
        bands = iter(ax.collections)
        for pruner in styles_of(cells.index.levels[0]):
            want = cells.loc[pruner]
            line = lines[STYLES[pruner].label]
            if pruner == "none":
                np.testing.assert_allclose(line.get_ydata(), want.to_numpy().mean())
                continue
            np.testing.assert_allclose(line.get_xydata(), np.stack([want.index, want.mean(axis=1)], 1))
            corners = next(bands).get_paths()[0].vertices
            for compression, seeds in want.iterrows():
                y = corners[corners[:, 0] == compression, 1]
                np.testing.assert_allclose([y.min(), y.max()], [seeds.min(), seeds.max()])
    assert "from the worst to the best" in text(figure)
    assert "mean over seeds" in text(figure)
    assert "one seed" in text(figures.figure3(table[table["seed"] == 0]))


def test_bars_are_the_scores_and_the_scores_are_r2_and_spearman(table):
    some = table.copy()
    some.loc[some["model"] == "fc-500", "bound"] = np.nan
    scores = findings.predictor_scores(some).set_index(["model", "quantity", "predictor"])
    assert len(scores) == 2 * 2 * 4
    for (model, quantity, predictor), row in scores.iterrows():
        here = some[(some["model"] == model) & some[predictor].notna()]
        assert row["runs"] == len(here)
        if len(here):
            r = stats.pearsonr(np.log(here[predictor]), here[quantity]).statistic
            assert row["r2"] == pytest.approx(r**2)
            assert row["spearman"] == pytest.approx(stats.spearmanr(here[predictor], here[quantity]).statistic)
        else:
            assert np.isnan(row["r2"])
    for ax, quantity in zip(figures.predictors(some).axes, QUANTITIES, strict=True):
        for bars, predictor in zip(ax.containers, PREDICTORS, strict=True):
            want = [scores.loc[(model, quantity, predictor), "r2"] for model in ("fc-100", "fc-500")]
            np.testing.assert_allclose([bar.get_height() for bar in bars], np.nan_to_num(want))
        assert "– (0)" in [label.get_text() for label in ax.texts]


@pytest.mark.parametrize("by", ["pruner", "compression"])
def test_captured_shares_are_means_that_end_with_the_shortest_list(table, by):
    some = table[table["model"] == "fc-100"].copy()
    cells = some["captured"].tolist()
    cells[0], cells[1] = cells[0][:5], None
    some["captured"] = pd.Series(cells, index=some.index, dtype=object)
    figure = figures.captured(some, by)
    (ax,) = figure.axes
    assert "1 run without shares left out" in text(figure)
    bars = iter(ax.collections)
    values = list(styles_of(some["pruner"])) if by == "pruner" else sorted(set(some["compression"]))
    for line, value in zip(ax.lines, values, strict=True):
        lists = [cell for cell in some["captured"][some[by] == value] if cell is not None]
        shortest = min(map(len, lists))
        want = np.array([cell[:shortest] for cell in lists])
        np.testing.assert_allclose(line.get_ydata(), want.mean(0))
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, shortest + 1))
        (bar,) = next(bars).get_segments()
        np.testing.assert_allclose(bar[:, 1], [want[:, -1].min(), want[:, -1].max()])


def test_a_pruner_looks_the_same_in_every_figure_and_like_no_other(table):
    assert len(STYLES) == 17
    assert len({(s.marker, s.filled) for s in STYLES.values()}) == len({s.colour for s in STYLES.values()}) == 17
    accuracy = figures.figure3(table)
    for figure in (figures.figure1(table), accuracy, figures.captured(table)):
        for ax in figure.axes:
            for pruner, style in STYLES.items():
                line = named(ax)[style.label]
                assert line.get_color() == style.colour
                level = pruner == "none" and figure is accuracy          # a level has no points
                assert line.get_marker() == ("None" if level else style.marker)


def test_no_font_is_smaller_than_seven_points(table):
    from matplotlib.text import Text

    for draw in DRAW.values():
        figure = draw(table)
        figure.draw_without_rendering()
        shown = [item for item in figure.findobj(Text) if item.get_text() and item.get_visible()]
        assert min(item.get_fontsize() for item in shown) >= 7


# Findings


def test_the_claims_hold_where_the_runs_were_made_so(table):
    found = judge_claims(table)
    width = found[found["claim"].str.contains("overtakes")]
    assert list(width["model"]) == ["fc-100", "fc-500", "fc-100 to fc-500"]
    assert list(width["held"]) == [None, None, True]
    assert width["value"].tolist() == pytest.approx([-5, 5, 10], abs=0.3)        # percentage points
    dist = found[found["claim"].str.contains("Dist")]
    assert list(dist["held"]) == [True] * 4
    assert dist["value"].tolist() == pytest.approx([-3] * 4, abs=0.3)
    linear = found[found["figure"] == 2]
    assert linear["value"].tolist() == pytest.approx(findings.fits(table)["r2"].tolist())
    assert list(linear["held"]) == [r2 >= 0.5 for r2 in linear["value"]]
    nearest = found[found["claim"].str.contains("nearest")]
    assert list(nearest["held"]) == [True] * 4
    for (_, row), ax in zip(nearest.iterrows(), figures.figure1(table).axes, strict=True):
        rms = {name: float(line.get_label().rsplit(" ", 1)[1]) for name, line in named(ax).items() if name != "dense"}
        pruner = {style.label: name for name, style in STYLES.items()}
        shown = {pruner[label]: value for label, value in rms.items()}
        listed = [part.rsplit(" ", 1)[0] for part in row["finding"].split(": ")[1].split(", ")]
        assert sorted(listed) == sorted(shown)
        assert [shown[name] for name in listed] == sorted(shown.values())      # some print alike


def test_the_claims_fail_where_the_runs_were_made_otherwise(table):
    swapped = table.replace({"pruner": {"synflow-l2": "synflow", "synflow": "synflow-l2", "synflow-dist": "synflow-l2",
                                        "synflow-l2-dist": "snip"}})
    found = judge_claims(table.assign(model=table["model"].map({"fc-100": "fc-500", "fc-500": "fc-100"})))
    assert found[found["model"] == "fc-100 to fc-500"]["held"].tolist() == [False]
    found = judge_claims(table.replace({"pruner": {"synflow-dist": "synflow", "synflow": "synflow-dist"}}))
    assert False in found[found["claim"].str.contains("Dist")]["held"].tolist()
    found = judge_claims(swapped)
    assert found[found["claim"].str.contains("nearest")]["held"].tolist() == [False] * 4


def test_the_order_of_the_traces_is_that_of_their_logarithms():
    table = sweep(models=("fc-100",), pruners=("snip", "synflow", "grasp", "none", "random"))
    shift = {"snip": 9.0, "synflow": 0.0, "grasp": -9.0, "none": 50.0, "random": -50.0}
    moved = table.assign(trace_pi_1=table["trace_pi_1"] * np.exp(table["pruner"].map(shift)))

    def order(runs):
        return judge_claims(runs).set_index("claim").loc["SNIP's path kernels are the largest, GraSP's the smallest"]

    mean = {name: np.log(moved[moved["pruner"] == name]["trace_pi_1"]).mean() for name in ("snip", "grasp")}
    assert order(moved)["value"] == pytest.approx(mean["snip"] - mean["grasp"])
    assert order(moved)["held"] is True
    assert re.search(r"snip \S+, synflow \S+, grasp \S+$", order(moved)["finding"])
    assert order(moved.replace({"pruner": {"snip": "grasp", "grasp": "snip"}}))["held"] is False
    assert order(moved[moved["pruner"] != "synflow"])["held"] is None
    dead = moved.assign(trace_pi_1=moved["trace_pi_1"].where(moved["compression"] < 3, 0.0))
    alive = moved[moved["compression"] < 3]
    assert order(dead)["value"] == pytest.approx(order(alive)["value"])      # a cut network has no logarithm


def test_the_bound_per_index_is_counted_over_the_networks_whose_spectra_are_known(table):
    def bound(runs, model="fc-100"):
        found = judge_claims(runs)
        return found[found["claim"].str.startswith("λ_i") & (found["model"] == model)]

    assert len(bound(table)) == 0
    few = table.assign(per_index=np.where(table["seed"] == 0, 1 + 1e-6, np.nan))
    assert bound(few)["held"].tolist() == [True]
    seen = ((few["seed"] == 0) & (few["model"] == "fc-100")).sum()
    assert bound(few)["finding"].item() == f"exceeded in 0 of {seen} networks"
    few.loc[few.index[:2], "per_index"] = 30.0, 40.0
    assert bound(few)["held"].tolist() == [False]
    assert bound(few)["value"].item() == 40.0
    assert re.match(r"exceeded in 2 of \d+ networks \(.*, at worst by a factor of 40 \(", bound(few)["finding"].item())
    unseen = table.assign(per_index=np.nan)
    assert bound(unseen)["held"].tolist() == [None]


def test_differences_of_pruners_are_paired_by_compression_and_seed():
    table = sweep(models=("fc-100",), pruners=("synflow", "synflow-l2"), seeds=3)
    table = table.drop(index=table[(table["pruner"] == "synflow") & (table["seed"] == 2)].index[:2])
    cells = table.pivot(columns="pruner", index=["compression", "seed"], values="test_accuracy")
    paired = 100 * (cells["synflow-l2"] - cells["synflow"]).dropna()
    want = paired.groupby("compression").mean()
    row = judge_claims(table).iloc[0]
    assert row["value"] == pytest.approx(want[want.index >= 1.5].mean())
    for compression, difference in want.items():
        assert f"{difference:+.2f} at {compression:g}" in row["finding"]


def test_models_that_differ_in_width_alone_are_compared():
    models = ("fc-100", "fc-1000", "fc-500", "fc-100x3", "vgg11", "vgg16", "resnet20", "wide_resnet20")
    found = judge_claims(sweep(models=models, pruners=("synflow", "synflow-l2"), compressions=(1.0,)))
    names = [name for name in found[found["figure"] == 3]["model"] if " to " in name]
    assert names == ["fc-100 to fc-1000", "resnet20 to wide_resnet20"]


def test_one_seed_is_not_judged():
    found = judge_claims(sweep(seeds=1))
    assert found[found["figure"] == 3]["held"].tolist() == [None] * 7
    assert "one seed" in found.iloc[0]["finding"]


# Bad input


@pytest.mark.parametrize("name", ALL)
def test_missing_columns_and_empty_tables_are_named(table, name):
    with pytest.raises(ValueError, match="lacks 'data', 'model'"):
        ALL[name](table.drop(columns=["model", "data"]))
    with pytest.raises(ValueError, match="no runs"):
        ALL[name](table.iloc[:0])
    with pytest.raises(ValueError, match=f"all {len(table)} runs of the table failed"):
        ALL[name](table.assign(status="failed"))


def test_failed_runs_and_useless_points_are_left_out_with_their_number(table):
    some = table.copy()
    some.loc[[0, 7], ["status", "test_accuracy"]] = ["failed", np.nan]
    for draw in DRAW.values():
        assert "2 failed runs left out" in text(draw(some))
    for name, find in TABLES.items():
        pd.testing.assert_frame_equal(find(some), find(some.drop(index=[0, 7])), obj=name)
    some.loc[3, "trace_pi"], some.loc[4, "trace_pi_1"], some.loc[5, "test_accuracy"] = 0.0, -1.0, np.nan
    for name in ("figure1", "figure2"):                      # one run, two quantities
        assert "2 points without a positive trace and a value left out" in text(DRAW[name](some))
    assert "1 run without an accuracy left out" in text(figures.figure3(some))
    assert findings.fits(some)["left_out"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ALL)
def test_one_run_and_one_compression_are_enough_to_draw(name, tmp_path):
    for few in (sweep(("fc-100",), ("snip",), (1.0,), 1), sweep(("fc-100",), ("snip", "none"), (1.0,), 2)):
        result = ALL[name](few)
        if name in DRAW:
            result.savefig(tmp_path / "few.png", dpi=40)
    if name == "figure2":
        (label,) = figures.figure2(few.iloc[:1]).axes[0].get_legend_handles_labels()[1]
        assert label == "fc-100: R² –, slope – (n = 1)"


@pytest.mark.parametrize("name", ALL)
def test_many_models_on_two_data_sets_are_kept_apart(name):
    models = ("fc-100", "fc-500", "fc-1000", "vgg11", "resnet20")
    some = pd.concat([sweep(models, ("snip", "synflow"), seeds=1),
                      sweep(("vgg16",), ("snip", "synflow"), seeds=1, data="cifar10")], ignore_index=True)
    result = ALL[name](some)
    if name in ("figure3", "captured"):
        titles = [ax.get_title("left") for ax in result.axes]
        assert titles == [*(f"{m}, mnist" for m in ("fc-100", "fc-500", "fc-1000", "resnet20", "vgg11")),
                          "vgg16, cifar10"]


@pytest.mark.parametrize("name", DRAW)
def test_names_are_no_formulae(name, table, tmp_path):
    figure = DRAW[name](table.replace({"model": {"fc-100": r"$\frac$", "fc-500": r"a$_{"}}))
    figure.savefig(tmp_path / "named.png", dpi=40)


def test_what_cannot_be_drawn_is_named(table):
    for draw in (figures.figure1, figures.figure3, figures.captured):
        with pytest.raises(ValueError, match="no style for pruner 'obd'"):
            draw(table.assign(pruner="obd"))
    with pytest.raises(ValueError, match="not for 'seed'"):
        unchecked(figures.captured)(table, "seed")
    with pytest.raises(ValueError, match="no run of the table has the shares"):
        figures.captured(table.assign(captured=None))


def test_a_missing_package_is_an_error_that_names_its_extra(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pkjax[sweep]'")):
        findings.fits(table)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panels._figure_class.cache_clear()
    with pytest.raises(ImportError, match=re.escape("pip install 'pkjax[plots]'")):
        figures.figure3(table)


def test_drawing_needs_no_pyplot(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)      # an import of it would be an error
    for draw in DRAW.values():
        draw(table)


# Given axes


@pytest.mark.parametrize(("name", "panels"), [("figure1", 4), ("figure2", 2), ("figure3", 2), ("predictors", 2),
                                              ("captured", 2)])
def test_figures_are_drawn_on_given_axes_one_for_each_panel(name, panels, table):
    from matplotlib.figure import Figure

    whole = Figure(figsize=(16, 12), layout="constrained")
    part = whole.subfigures(1, 2)[1]
    axes = part.subplots(panels, 1)
    assert DRAW[name](table, axes=axes) is part
    assert [ax.get_title(loc="left") for ax in axes] == [ax.get_title(loc="left") for ax in DRAW[name](table).axes]
    whole.draw_without_rendering()
    with pytest.raises(ValueError, match=f"drawn on {panels} panels, but 1 axes were received"):
        DRAW[name](table, axes=[axes[0]])
