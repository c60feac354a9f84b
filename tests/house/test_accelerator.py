"""The accelerator's parts run at a small size, and compare what they say they compare."""

import io
import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from benchmarks.accelerator import exactness, figure3, images, kernels, pruning, tpu_compile, training
from benchmarks.accelerator.rows import Rows
from benchmarks.bench_pruning import draw
from benchmarks.common import ROOT

PARTS = (exactness, figure3, images, kernels, pruning, tpu_compile, training)


def test_parts_load_without_pytorch_and_tensorflow_datasets(monkeypatch):
    for absent in ("torch", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, absent, None)
    for part in PARTS:
        assert runpy.run_path(part.__file__, run_name="loaded")["__doc__"] == part.__doc__


def test_a_table_is_whole_after_each_row_and_says_where_it_was_made(tmp_path):
    rows = Rows(tmp_path / "folder" / "rows.json", type="float32")
    assert json.loads(rows.output.read_text())["rows"] == []
    rows.add(case="a", error=float("inf"))
    rows.add(case="b", inner={"seconds": float("nan")})
    content = json.loads(rows.output.read_text())
    assert content["rows"] == [{"case": "a", "error": "inf"}, {"case": "b", "inner": {"seconds": "nan"}}]
    assert {"card", "runtime", "default_matmul_precision", "commit", "jax", "type"} <= set(content["environment"])
    assert rows.failed == 1


def test_a_part_without_a_finished_row_has_failed(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    rows.add(case="a", unfinished="no time left")
    assert rows.failed == 1
    rows.add(case="b", **{"not tried": "an array of 864 GB"})
    rows.add(case="c", **{"out of memory": "of another library"})
    assert rows.failed == 1
    rows.add(case="d")
    assert rows.failed == 0


def test_what_takes_too_long_ends_with_rows_that_say_so(tmp_path):
    code = f"""
import time
from pathlib import Path
from benchmarks.accelerator.rows import Rows
rows = Rows(Path({str(tmp_path / "rows.json")!r}))
with rows.within(60, {{"case": "a"}}):
    rows.add(case="a")
with rows.within(0.1, {{"case": "b"}}, {{"case": "c"}}):
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert first == {"case": "a"}
    assert [row["case"] for row in others] == ["b", "c"]
    assert all("not ready after" in row["unfinished"] for row in others)


@pytest.mark.parametrize(("seconds", "calls"), [(0.5, 5), (1.5, 2), (30.0, 1)])
def test_slow_loops_are_called_less_often(monkeypatch, seconds, calls):
    clock = iter(np.arange(0, 100) * seconds)
    monkeypatch.setattr(pruning.time, "perf_counter", lambda: next(clock))
    assert pruning.timed(lambda: None)[1]["calls"] == calls


def test_masks_differ_where_a_weight_is_in_one_alone():
    masks = {"a": np.array([True, False, True]), "b": np.array([True])}
    assert pruning.differing(masks, {"a": np.array([False, False, True]), "b": np.array([False])}) == 2


def test_the_pruning_part_compares_equal_masks(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    def here(function, *inputs):
        if function is pruning.by_torch:
            return function(*inputs)
        masks = pruning.by_torch(*inputs)[0]      # float64 is for a process of its own
        next(iter(masks.values())).flat[0] ^= True
        return masks

    monkeypatch.setattr(pruning, "in_fresh_process", here)
    assert pruning.main(["--small", "--output", str(tmp_path / "pruning.json")]) == 0
    ours, theirs, exact = json.loads((tmp_path / "pruning.json").read_text())["rows"]
    assert (ours["side"], theirs["masks_differ"]) == ("pkjax", 0)
    assert exact["masks_differ_float64"] == {"pkjax": 1, "torch": 1}
    assert 0 < ours["min"] <= ours["median"] <= ours["max"]


def test_the_training_part_times_first_and_later_epochs(tmp_path):
    training.main(["--small", "--output", str(tmp_path / "training.json")])
    one = json.loads((tmp_path / "training.json").read_text())["rows"][0]
    assert one["networks"] == 1
    assert one["first_epoch"] > 0
    assert len(one["later_epochs"]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")      # forward derivatives of the newest PyTorch
@pytest.mark.parametrize("implementation", [1, 2])
def test_kernels_by_torch_func_are_those_of_the_same_network(implementation):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_kernels, torch_synflow

    case = kernels.CASES["tiny, N = 8"]
    variables, x = draw(case.network), kernels._inputs(case)[:3]
    theirs = torch_synflow.load(case.network.torch_module(torch_synflow), variables)
    theta = torch_kernels.theta(theirs, implementation)(torch.tensor(x.reshape(3, -1)))
    want = pk.ntk(*pk.from_linen(case.network.module(), variables), jnp.asarray(x))
    np.testing.assert_allclose(theta.numpy(), want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


def test_resnet18_is_the_same_network_on_both_sides():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_synflow

    network = kernels.CASES["ResNet-18 at 64x64, N = 16"].network
    module, variables = network.module(), draw(network)
    x = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
    theirs = torch_synflow.load(torch_synflow.resnet18(), variables)
    with torch.no_grad():
        want = theirs(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(module.apply(variables, x), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_a_side_that_fails_is_a_row_that_says_so():
    class Ended:
        def poll(self, seconds):
            return True

        def recv(self):
            raise EOFError

    side = object.__new__(kernels.Side)
    side.connection, side.figures = Ended(), {}
    assert not side.hear(0)
    assert side.figures == {"error": "its process died"}
    slow = object.__new__(kernels.Side)
    slow.connection, slow.figures = SimpleNamespace(poll=lambda seconds: False), {}
    assert not slow.hear(0)
    assert slow.figures == {"unfinished": "takes too long"}


def test_kernels_come_in_the_order_of_importance_and_two_at_a_time_at_most():
    names = ["FC-100, N = 100", "FC-500, N = 100", "FC-100, N = 1000", "FC-2000, N = 1000"]
    groups = list(kernels.planned(names, kernels.SIDES, memory=140e9))
    assert groups[:2] == [[(name, "pkjax") for name in names[:2]], [(name, "pkjax") for name in names[2:]]]
    places = {side: at for at, side in enumerate(kernels.SIDES)}
    order = [places[side] for group in groups if len(group) > 1 for _, side in group]
    assert order == sorted(order)
    tasks = [task for group in groups for task in group]
    assert len(tasks) == len(set(tasks))
    assert {(name, side) for name in names for side in kernels.SIDES} - set(tasks) == {
        *((names[-1], side) for side in ("neural-tangents 1", "torch.func 1")),
        *((name, "torch.func 2") for name in names[1:])}      # as it was: 157 GB, and 2.9 TiB, out of memory
    assert [("FC-100, N = 1000", "neural-tangents 1")] in groups      # large, and so alone
    assert [("FC-100, N = 100", "torch.func 2")] in groups


def test_kernels_that_the_time_does_not_reach_are_not_begun(monkeypatch):
    monkeypatch.setattr(kernels, "Side", None)
    rows = list(kernels.measure(["tiny, N = 8"], kernels.SIDES, first=30, end=kernels.time.monotonic() + 1))
    assert rows == [{"case": "tiny, N = 8", "side": side, "unfinished": "no time left"} for side in kernels.SIDES]


def test_exactness_begins_with_what_matters_and_ends_with_the_reports():
    tasks = exactness.ordered([*exactness.NETWORKS][:-1], [*exactness.FUNCTIONS])
    assert len(tasks) == len(set(tasks)) == 39
    assert tasks[:4] == [("fc-100", "ntk"), ("resnet20", "ntk"), ("fc-100", "ntk, highest"),
                         ("resnet20", "ntk, highest")]
    assert {label for _, label in tasks[-3:]} == {"analyze"}


def test_images_travel_encoded_and_come_back_equal(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels = images.noise(5).pixels

    def png(image):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        return out.getvalue()

    images.store(tmp_path / "few.npz", {split: ([png(image) for image in pixels], [3, 1, 4, 1, 5])
                                       for split in images.SPLITS})
    back = images.load(tmp_path / "few.npz", "test")
    assert np.array_equal(back.pixels, pixels)
    assert back.labels.tolist() == [3, 1, 4, 1, 5]


def test_the_sweep_of_figure_3_is_the_dense_network_and_six_pruners_at_two_compressions():
    runs = figure3.runs(False, 10)
    assert len(runs) == 13
    assert {(run.epochs, run.drops, run.model) for run in runs} == {(10, (8,), "resnet20")}
    assert [run.compression for run in runs] == [0.0, *[1.0] * 6, *[2.0] * 6]


@pytest.mark.parametrize(("eight", "want"), [(8.0, (4, 1.0)), (16.0, (1, 1.5)), (None, (1, 1.5))])
def test_figure_3_trains_networks_together_where_that_is_faster(tmp_path, eight, want):
    rows = [{"networks": 1, "later_epochs": [1.7, 1.5]}, {"networks": 8, "unfinished": "not ready"}]
    if eight:
        rows[1] = {"networks": 8, "later_epochs": [eight]}
    (tmp_path / "training.json").write_text(json.dumps({"rows": rows}))
    assert figure3.pace(SimpleNamespace(output=tmp_path / "figure3.json", small=False)) == want


def test_differences_are_relative_to_the_largest_entry_and_of_masks_a_share():
    assert exactness.difference(np.array([1.0, 4.0]), np.array([1.5, 4.0])) == 0.125
    assert exactness.difference([np.array([True, False])], [np.array([True, True])]) == 0.5


def test_the_table_of_a_tpu_is_the_one_that_was_compiled():
    content = json.loads((ROOT / "benchmarks" / "results" / "accelerator" / "tpu_v5e.json").read_text())
    assert "not run" in content["environment"]["note"]
    assert all(row["fits"] for row in content["rows"])
    assert tpu_compile.table(content) in (ROOT / "docs" / "accelerators.md").read_text()


def test_figures_of_a_compiled_program_are_a_lower_bound_of_its_time():
    compiled = jax.jit(lambda a: a @ a).lower(jax.ShapeDtypeStruct((512, 512), jnp.float32)).compile()
    figures = tpu_compile.figures(compiled, 1, passes=6)
    assert figures["operations"] == 2 * 512**3
    assert figures["roofline"] == pytest.approx(6 * 2 * 512**3 / 197e12)
    assert (figures["bound by"], figures["collectives"], figures["fits"]) == ("operations", {}, True)


def test_the_command_knows_its_parts(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "accelerator" / "run.sh"), str(tmp_path), "--small", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown part nonsense" in done.stderr
    assert all(part in done.stderr for part in ("exactness", "kernels", "pruning", "training", "figure3"))
