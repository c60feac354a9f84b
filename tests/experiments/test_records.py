"""A record is that of its run, or is refused by name; a run that diverged is not taken for a network without paths."""

import json
import math
import shutil

import numpy as np
import pytest
from pkjax.experiments import figures, findings, records, sweeps
from pkjax.experiments.paper_claims import judge_claims
from pkjax.experiments.settings import Settings, grid

RUNS = grid({"model": "fc-6x1", "epochs": 1, "pruner": "synflow", "compression": [0.5, 1.0, 1.5, 2.0, 2.5],
             "learning_rate": 0.1})
MASKS = {"kernel": np.ones((2, 2), bool)}


def record(chosen, *, ln_trace=1.0, weight_change=1.0, **more):
    row = {"test_loss": 1.0, "test_accuracy": 0.5, "output_norm": 2.0, "output_change": 1.0}
    history = [{"epoch": 0, **row, "ln_trace_pi": ln_trace, "weight_change": 0.0},
               {"epoch": 1, **row, "ln_trace_pi": ln_trace, "weight_change": weight_change, "learning_rate": 0.1,
                "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0}]
    return {"format": records.FORMAT, "key": chosen.key, "status": "done", "settings": chosen.to_dict(),
            "pruning": {"density": 0.1, "kept": 4, "layers": []}, "initial": {"trace_ntk": 1.0, "gated_trace": 1.0},
            "spectra": None, "steps": 3, "history": history, "seconds": 2.0, **more}


def failure(chosen, **more):
    return {"format": records.FORMAT, "key": chosen.key, "status": "failed", "settings": chosen.to_dict(),
            "error": "out of memory", **more}


def write(folder, *written):
    for each in written:
        if each["status"] == "done":
            records.write_record(folder, each, MASKS)
        else:
            records.write_failure(folder, each)
    return folder


@pytest.fixture
def results(tmp_path):
    """Five runs: three with traces, one of a network without paths, one that diverged."""
    return write(tmp_path / "r", *(record(chosen, ln_trace=float(i), weight_change=1.0 + i) for i, chosen in
                                   enumerate(RUNS[:3])), record(RUNS[3], ln_trace=-math.inf),
                 record(RUNS[4], ln_trace=math.nan, weight_change=math.nan))


def test_a_diverged_run_is_no_network_without_paths(results):
    table = records.table(results).set_index("key")
    assert table.loc[RUNS[3].key, "trace_pi"] == table.loc[RUNS[3].key, "trace_pi_1"] == 0
    assert np.isnan(table.loc[RUNS[4].key, ["trace_pi", "trace_pi_1", "weight_change"]].astype(float)).all()
    assert table["diverged"].sum() == table.loc[RUNS[4].key, "diverged"] == 1
    epochs = records.epochs_table(results)
    assert epochs[epochs["key"] == RUNS[3].key]["ln_trace_pi"].tolist() == [-math.inf, -math.inf]
    assert np.isnan(epochs[epochs["key"] == RUNS[4].key]["ln_trace_pi"]).all()
    back = records.table(records.export(results)).set_index("key")
    assert back["diverged"].equals(table["diverged"])


@pytest.mark.parametrize("change", [{"weight_change": math.inf}, {"ln_trace": math.inf}, {"weight_change": math.nan}])
def test_a_run_with_any_number_out_of_range_diverged(tmp_path, change):
    (row,) = records.table(write(tmp_path, record(RUNS[0], **change))).itertuples()
    assert row.diverged
    with pytest.raises(ValueError, match="all 1 runs of the table diverged"):
        figures.figure2(records.table(tmp_path))


def test_diverged_runs_are_left_out_of_figures_and_findings_with_their_number(results):
    table = records.table(results)
    alive = table[~table["diverged"]]
    for draw in (figures.figure1, figures.figure2, figures.figure3):
        drawn, want = draw(table), draw(alive)
        assert "1 diverged run left out" in drawn.get_supxlabel().replace("\n", " ")
        for ax, bx in zip(drawn.axes, want.axes, strict=True):
            for line, other in zip(ax.lines, bx.lines, strict=True):
                np.testing.assert_array_equal(line.get_xydata(), other.get_xydata())
    fits, want = findings.fits(table), findings.fits(alive)
    assert fits.drop(columns="left_out").equals(want.drop(columns="left_out"))
    assert fits["left_out"].tolist() == [2, 2]      # the network without paths has no logarithm
    assert want["left_out"].tolist() == [1, 1]
    assert np.isfinite(fits["slope"]).all()
    assert judge_claims(table).astype(str).equals(judge_claims(alive).astype(str))
    older = table.drop(columns="diverged")      # a table of an earlier version
    assert "1 diverged run left out" in figures.figure3(older).get_supxlabel().replace("\n", " ")


def test_figures_of_failed_runs_alone_say_that_all_failed(tmp_path):
    table = records.table(write(tmp_path, *map(failure, RUNS[:2])))
    for draw in (figures.figure1, figures.figure2, figures.figure3, figures.predictors, figures.captured, judge_claims):
        with pytest.raises(ValueError, match="all 2 runs of the table failed"):
            draw(table)


@pytest.mark.parametrize("column", ["weight_change", "diverged"])
def test_a_column_without_numbers_is_refused_by_name(results, column):
    table = records.table(results).astype({column: object})
    table.loc[0, column] = "no"
    with pytest.raises(ValueError, match=f"the column '{column}' of the table of runs does not hold numbers"):
        figures.figure2(table)


def tampered(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value != "remove"}))


def other_settings(chosen, **changes):
    return {name: value for name, value in {**chosen.to_dict(), **changes}.items() if value != "remove"}


BAD = {
    "another format": ({"format": "pkjax run 2"}, "has the format 'pkjax run 2', but this version reads"),
    "no format": ({"format": "remove"}, "it has no format"),
    "another key": ({"key": RUNS[1].key}, f"it belongs to the run '{RUNS[1].key}'"),
    "another run's settings": ({"settings": RUNS[1].to_dict()}, f"its settings are those of the run {RUNS[1].key}"),
    "a missing setting": ({"settings": other_settings(RUNS[0], seed="remove")}, "its settings lack seed"),
    "a foreign setting": ({"settings": other_settings(RUNS[0], momentum=0.9)}, "hold momentum 0.9, which no run"),
    "an impossible setting": ({"settings": other_settings(RUNS[0], seed=-1)}, "seed must not be negative"),
    "a setting of another type": ({"settings": other_settings(RUNS[0], epochs="3")}, "epochs"),
    "no settings": ({"settings": None}, "record.json is not the record of a run"),
    "another status": ({"status": "failed"}, "among the runs that are done, but its status is 'failed'"),
    "no history": ({"history": "remove"}, "it lacks 'history'"),
    "an empty history": ({"history": []}, "its history is empty"),
    "a history of null": ({"history": [{"epoch": 0, "ln_trace_pi": None}]}, "its history holds"),
    "a history of truth values": ({"history": [{"epoch": 0, "ln_trace_pi": True}]}, "its history holds"),
    "a number that no column takes": ({"history": [{"epoch": 0, "ln_trace_pi": 10**400}]}, "its history holds"),
    "a text for a number": ({"initial": {"trace_ntk": "abc"}}, "its trace_ntk is 'abc', where numbers belong"),
    "null for a number": ({"initial": {"trace_ntk": None}}, "its trace_ntk is None, where numbers belong"),
    "a list for a number": ({"steps": [1]}, "its steps is [1], where numbers belong"),
    "an integer beyond 64 bits": ({"steps": 2**63}, f"its steps is {2**63}, where numbers belong"),
    "a text for shares": ({"spectra": {"captured": "abc"}}, "its captured is 'abc', where numbers belong"),
    "a table for shares": ({"spectra": {"captured": [[1.0]]}}, "its captured is [[1.0]], where numbers belong"),
    "a history without traces": ({"history": [{"epoch": 0}]}, "it lacks 'ln_trace_pi'"),
    "no pruning": ({"pruning": None}, "record.json is not the record of a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_the_record_of_its_run_is_refused_by_name_everywhere(results, case):
    changes, message = BAD[case]
    tampered(results / "runs" / RUNS[0].key / "record.json", **changes)
    refused(results, message, RUNS[0].key)


def refused(results, message, named):
    for read in (records.table, records.epochs_table, records.export, lambda folder: sweeps.sweep(RUNS, folder)):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")) as info:
            read(results)
        assert named in str(info.value)


def test_a_torn_record_is_refused_by_name(results):
    file = results / "runs" / RUNS[0].key / "record.json"
    file.write_bytes(file.read_bytes()[:-9])
    refused(results, "record.json is not the record of a run: .*; delete it to run the experiment again", RUNS[0].key)
    write(results, failure(Settings(seed=9)))
    (results / "failed" / f"{Settings(seed=9).key}.json").write_bytes(b"\xff")
    shutil.rmtree(file.parent)
    refused(results, "json is not the record of a run", Settings(seed=9).key)


def test_a_run_that_failed_and_then_finished_is_done(results):
    write(results, failure(RUNS[0]))
    table = records.table(results)
    assert len(table) == 5
    assert (table["status"] == "done").all()
    assert sweeps.sweep(RUNS, results) == (0, 0, 5)


def test_a_folder_without_a_record_is_named_by_the_table_and_run_again_by_the_sweep(results):
    (results / "runs" / RUNS[0].key / "record.json").unlink()
    for read in (records.table, records.epochs_table, records.export):
        with pytest.raises(ValueError, match=f"{RUNS[0].key} holds no record.json: run the sweep again"):
            read(results)
    with pytest.raises(ValueError, match=f"{RUNS[0].key} holds no record.json"):
        sweeps.sweep(RUNS[1:], results)
    assert records.recorded(results)[0] == {chosen.key for chosen in RUNS[1:]}
    records.check_records(results, again={RUNS[0].key})


def test_what_is_no_record_is_not_looked_at_and_half_written_ones_are_deleted(results):
    (results / "runs" / ".0123456789abcdef.part").mkdir()
    (results / "failed").mkdir()
    (results / "failed" / ".0123456789abcdef.part").write_text("{")
    (results / "runs" / "notes.txt").write_text("mine")
    assert len(records.table(results)) == 5
    assert sweeps.sweep(RUNS, results) == (0, 0, 5)
    assert not list(results.glob("*/.*.part"))
    assert (results / "runs" / "notes.txt").exists()


def test_epochs_of_failed_runs_alone_are_a_table_with_columns(tmp_path):
    epochs = records.epochs_table(write(tmp_path, failure(RUNS[0])))
    assert len(epochs) == 0
    assert {"key", "model", "epoch"} <= set(epochs.columns)
