"""What is written appears whole or not at all, under any name, and JSON keeps every float."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pkjax import files

TEXTS = st.sampled_from(["NaN", "Infinity", "-Infinity", "\\NaN", "\\\\-Infinity", "nan", "λ", ""]) | st.text()
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS, lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8)


@given(VALUES)
def test_json_gives_back_every_value_and_is_strict(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = files.to_json(value)
    json.loads(text, parse_constant=refuse)
    assert repr(files.from_json(text)) == repr(value)       # NaN equals nothing


def test_nan_and_both_infinities_and_nothing_are_four_things():
    assert files.to_json([math.nan, math.inf, -math.inf, None]) == '["NaN", "Infinity", "-Infinity", null]'


def synced(monkeypatch):
    """Names of the files and folders that are synced, and of what they are renamed to, in order."""
    events, fsync, replace = [], os.fsync, os.replace

    def record_sync(number):
        events.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def record_move(source, target):
        events.append(("move", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_move)
    return events


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    events = synced(monkeypatch)
    with files.replacing(tmp_path / "a.json") as part:
        part.write_text("{}")
    assert events == [("sync", str(part)), ("move", str(part), str(tmp_path / "a.json")), ("sync", str(tmp_path))]
    for target in (tmp_path / "new", tmp_path / "new"):     # the second time it exists
        events.clear()
        with files.folder(target) as place:
            (place / "one").write_text("1")
            (place / "two").write_text("2")
        moved = next(i for i, event in enumerate(events) if event[0] == "move")
        assert {("sync", str(place / name)) for name in ("one", "two")} | {("sync", str(place))} <= set(events[:moved])
        assert events[-1] in (("sync", str(tmp_path)), ("sync", str(target)))
    assert sorted(os.listdir(tmp_path)) == ["a.json", "new"]


@pytest.mark.parametrize("name", ["n" * 255, "λ" * 127, "z[red].npz", "50%", "*?[", "$x$", " "])
def test_a_name_that_the_system_takes_can_be_written_to(tmp_path, name):
    with files.replacing(tmp_path / name) as part:
        part.write_text("x")
    assert (tmp_path / name).read_text() == "x"
    (tmp_path / name).unlink()
    with files.folder(tmp_path / name) as place:
        (place / "file").write_text("y")
    assert (tmp_path / name / "file").read_text() == "y"
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_is_too_long_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="too long") as info, files.replacing(tmp_path / ("n" * 256)) as part:
        part.write_text("x")
    assert info.value.filename == str(tmp_path / ("n" * 256))
    assert os.listdir(tmp_path) == []
