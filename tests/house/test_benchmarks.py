"""The benchmarks run in a tiny setting, and compare what they say they compare."""

import importlib.util
import json
import os
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import (
    bench_first_calls,
    bench_ntk,
    bench_path_kernel,
    bench_pruning,
    bench_shrink,
    common,
    trace_against_spectrum,
)


def test_modules_load_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in (common, bench_first_calls, bench_ntk, bench_path_kernel, bench_pruning, bench_shrink,
                   trace_against_spectrum):
        assert runpy.run_path(module.__file__, run_name="loaded")["__doc__"] == module.__doc__


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    peak = common.peak_memory(lambda: int(np.ones(2**24, np.uint8).sum()))
    if peak is None:
        pytest.skip("only Linux tells")
    assert 2**24 <= peak < 2**25


def test_a_fresh_process_is_another_one():
    assert common.in_fresh_process(os.getpid) != os.getpid()


def test_calls_are_timed_in_turns_and_the_first_stands_apart():
    made = []
    timings, results = common.alternate({"a": lambda: made.append("a") or 1, "b": lambda: made.append("b") or 2}, 2)
    assert (made, results) == (["a", "b", "b", "a", "a", "b"], {"a": 1, "b": 2})
    summary = common.Timing([8.0, 1.0, 4.0, 2.0], [6.0, 0.0, 1.0, 0.0]).summary(2)
    assert summary == {"first": 4, "median": 1, "min": 0.5, "max": 2, "compiling": 0, "repeats": 3}
    assert len(timings["a"].seconds) == len(timings["b"].compiling) == 3


def test_a_turn_lasts_and_counts_as_the_median_of_its_calls(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    made = []
    timings, _ = common.alternate({"a": lambda: made.append(1)}, 1, least=20.0)
    assert timings["a"].seconds == [1, 1]
    assert len(made) > 3, "more than one call in the warm turn"


def test_growth_is_fitted_and_drawn(tmp_path):
    fitted = common.fit([1, 2, 4], [3.0, 12.0, 48.0])
    assert fitted["exponent"] == pytest.approx(2)
    common.draw_growth({"width": fitted, "depth": common.fit([1, 2], [1.0, 1.0])}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_path_kernel_benchmark_agrees_with_enumeration(tmp_path, capsys):
    path = tmp_path / "path_kernel.json"
    report = bench_path_kernel.main(["--quick", "--repeats", "1", "--output", str(path)])
    assert json.loads(path.read_text()) == report
    figures = report["networks"]["tiny"]
    assert figures["passes"] > 0
    assert figures["counting"]["count"] >= 1
    assert figures["top"]["converged"]
    assert figures["top"]["bound"] < 1e-8
    assert [case["paths"] for case in report["enumeration"]] == [16, 128]
    assert all(case["differ"] < 1e-8 for case in report["enumeration"])
    assert max(map(len, capsys.readouterr().out.splitlines()[1:])) <= 80


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.slow
def test_quick_run_reports_every_figure(tmp_path, capsys):
    pytest.importorskip("torch")
    path = tmp_path / "pruning.json"
    report = bench_pruning.main(["--quick", "--compression", "1", "--output", str(path)])
    assert json.loads(path.read_text()) == report
    assert {"pkjax", "commit", "jax", "jaxlib", "torch", "python", "device", "cpu", "cores", "threads", "date", "load",
            "load_after"} <= set(report["environment"])

    figures = report["networks"]["tiny"]
    assert figures["weights"] == 784 * 10 + 10 * 10
    assert figures["parameter_bytes"] == 4 * (figures["weights"] + 20)
    assert figures["masks"]["steps"] == 3
    assert figures["masks"]["kept"]["pkjax"] == 794
    assert abs(figures["masks"]["kept"]["pytorch"] - 794) <= 2, "but for ties"
    assert figures["masks"]["differing"] <= 2
    for sides in figures["seconds"].values():
        for timing in sides.values():
            assert 0 < timing["min"] <= timing["median"] <= timing["max"]
    limit = figures["limit"]
    assert limit["bytes"] == 19 * figures["weights"]
    assert limit["seconds"]["memory"] == limit["bytes"] / report["machine"]["bandwidth"]
    for side in bench_pruning.SIDES:
        loop = figures["seconds"]["loop, per step"][side]["median"]
        assert limit["distance"][side] == pytest.approx(loop / max(limit["seconds"].values()))
    out = capsys.readouterr().out
    assert "masks after 3 steps differ" in out
    assert max(map(len, out[out.index("\ntiny:"):].splitlines())) <= 80


@pytest.mark.parametrize("name", ["tiny", "ResNet-20", "VGG-16-BN"])
def test_both_sides_are_the_same_network(name):
    torch = pytest.importorskip("torch")
    variables, rng = bench_pruning.draw(bench_pruning.NETWORKS[name]), np.random.default_rng(1)
    variables = jax.tree.map(lambda v: v + jnp.asarray(0.1 * rng.random(v.shape), v.dtype), variables)
    network = bench_pruning.NETWORKS[name]
    theirs = bench_pruning.TorchSide(name, variables).network
    x = rng.standard_normal((2, *network.shape)).astype(np.float32)
    got = network.module().apply(variables, x)
    image = x.reshape(2, -1) if x.shape[-1] == 1 else x.transpose(0, 3, 1, 2)
    with torch.no_grad():
        want = theirs(torch.tensor(np.ascontiguousarray(image))).numpy()
    assert np.ptp(want) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_pruning_leaves_the_network_as_it_was():
    torch = pytest.importorskip("torch")
    side = bench_pruning.TorchSide("tiny", bench_pruning.draw(bench_pruning.NETWORKS["tiny"]))
    before = {name: p.detach().clone() for name, p in side.network.named_parameters()}
    masks = side.prune(0.25, 2)
    after = dict(side.network.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.25 * side.weights)


@pytest.mark.slow
def test_the_tangent_kernel_benchmark_compares_equal_kernels(tmp_path, capsys):
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip("neural-tangents is not installed")
    path = tmp_path / "ntk.json"
    report = bench_ntk.main(["--quick", "--no-growth", "--repeats", "1", "--output", str(path)])
    assert json.loads(path.read_text()) == report
    figures = report["networks"]["tiny"]
    assert set(figures["seconds"]) == {"pkjax", "neural-tangents 1", "neural-tangents 2"}
    assert all(error < 1e-5 for error in figures["differ"].values())
    assert figures["times_faster"] > 0
    assert "times as fast" in capsys.readouterr().out


def test_projections_notice_a_wrong_kernel():
    case = bench_ntk.CASES["tiny"]
    theta = bench_ntk.calls(case)["pkjax"]()
    assert bench_ntk.projections(case, theta) < 1e-5
    assert bench_ntk.projections(case, theta.at[0, 1].mul(2)) > 1e-3


def test_first_calls_are_measured_in_plain_gradients_and_their_programs_counted(monkeypatch):
    every = bench_first_calls.functions

    def few(network):
        return {name: every(network)[name] for name in (bench_first_calls.PLAIN, "path_kernel.trace")}

    monkeypatch.setattr(bench_first_calls, "functions", few)
    kept = jax.config.jax_enable_compilation_cache
    try:
        rows = bench_first_calls.timed("tiny", rounds=1)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    assert rows[bench_first_calls.PLAIN]["ratio"] == 1
    assert 0 < rows["path_kernel.trace"]["again"] < rows["path_kernel.trace"]["first"]
    count = common.in_fresh_process(bench_first_calls.counted, "tiny", bench_first_calls.PLAIN)
    assert count["programs"] == 1
    assert count["equations"] > 10
    assert count["instructions"] > 10


@pytest.mark.slow
def test_the_shrink_benchmark_compares_equal_outputs(tmp_path):
    path = tmp_path / "shrink.json"
    bench_shrink.main(["--networks", "FC-100", "--compression", "1", "--steps", "9", "--batch", "2", "--repeats", "1",
                       "--output", str(path)])
    (row,) = json.loads(path.read_text())["networks"]
    assert row["difference"] < 1e-5
    assert row["weights_kept"] < row["after"]["parameters"] < row["before"]["parameters"] == 130010


def test_the_headline_comparison_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    plan = trace_against_spectrum.Plan("fc-6x1", "digits", 2, None, (0.5,), seeds=1, pruners=("magnitude", "random"))
    monkeypatch.setattr(trace_against_spectrum, "PLANS", {"tiny": plan})
    file = tmp_path / "trace_against_spectrum_tiny.json"
    whole = trace_against_spectrum.main(["tiny", "--output", str(tmp_path)])["tiny"]
    assert [row[:3] for row in whole.rows] == [("dense", 0.0, 0), ("magnitude", 0.5, 0), ("random", 0.5, 0)]
    assert file.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    written = json.loads(file.read_text())
    written["comparison"]["rows"].pop()
    written["comparison"]["spectra"].pop()
    file.write_text(json.dumps(written))
    again = trace_against_spectrum.main(["tiny", "--output", str(tmp_path)])["tiny"]
    assert [row[:3] for row in again.rows] == [row[:3] for row in whole.rows]
    np.testing.assert_allclose(again.rows[2].trace_ntk, whole.rows[2].trace_ntk, rtol=1e-5)
    with pytest.raises(ValueError, match="written for other settings"):
        trace_against_spectrum.run(trace_against_spectrum.replace(plan, samples=3), file, 1.0)
