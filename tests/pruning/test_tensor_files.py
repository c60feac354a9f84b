"""Safetensors files: read back as they were, by the format's own reader too, and never half written."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import load_safetensors, save_safetensors

PARAMS = {"a": {"bias": jnp.array([1.5, -0.25], jnp.bfloat16), "kernel": np.arange(6, dtype=np.float32).reshape(3, 2)},
          "b": [jnp.array(2.0, jnp.float16), np.arange(4).reshape(2, 2).T]}
MASKS = {"a": {"bias": jnp.array([True, True]), "kernel": jnp.array([[True, False], [False, True], [True, True]])},
         "b": [jnp.array(True), jnp.array([[True, False], [True, True]])]}


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jnp.result_type(x) == jnp.result_type(y) and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_parameters_and_masks_come_back_in_their_types(tmp_path):
    save_safetensors(tmp_path / "plain", PARAMS)
    save_safetensors(tmp_path / "masked", PARAMS, masks=MASKS)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), PARAMS)
    params, masks = load_safetensors(tmp_path / "plain", like=shapes)
    assert masks is None and same(params, PARAMS)      # noqa: PT018
    params, masks = load_safetensors(tmp_path / "masked", like=PARAMS)
    assert same(masks, MASKS)
    assert same(params, pk.apply_masks(PARAMS, MASKS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masked", "plain"]


def test_the_bytes_are_those_of_the_format(tmp_path):
    save_safetensors(tmp_path / "file", {"a": {"kernel": jnp.array([[1.0, 2.0]], jnp.float32)}},
                     masks={"a": {"kernel": jnp.array([[False, True]])}})
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    header.pop("__metadata__", None)
    kernel, mask = header["a/kernel"], header["a/kernel:mask"]
    assert (kernel["dtype"], kernel["shape"], mask["dtype"]) == ("F32", [1, 2], "BOOL")
    start, end = (8 + length + at for at in kernel["data_offsets"])
    assert np.frombuffer(content[start:end], "<f4").tolist() == [0.0, 2.0]
    assert set(header) == {"a/kernel", "a/kernel:mask"}


@pytest.mark.parametrize(("like", "message"), [
    ({"a": jnp.ones((2, 2))}, r"no 'a' \(but w\)"), ({"w": jnp.ones((2, 3))}, r"shape \(2, 2\) at 'w', where like has"),
    ({"w": jnp.ones((2, 2), jnp.bfloat16)}, "where like has bfloat16"), ({}, "'w', which like does not have")])
def test_tensors_of_another_network_are_refused(tmp_path, like, message):
    save_safetensors(tmp_path / "file", {"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=message):
        load_safetensors(tmp_path / "file", like=like)


def test_damaged_and_missing_files_are_named(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "file", PARAMS)
    content = (tmp_path / "file").read_bytes()
    for damaged in (b"", content[:20], content[:-1], b"\xff" * 40):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(ValueError, match="bad' is not a readable safetensors file"):
            load_safetensors(tmp_path / "bad", like=PARAMS)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "none", like=PARAMS)
    with pytest.raises(ValueError, match="leaf 'w:mask' has the name of a mask"):
        save_safetensors(tmp_path / "file", {"w": jnp.ones(1), "w:mask": jnp.ones(1)},
                         masks={"w": jnp.array([True]), "w:mask": jnp.array([True])})
    with pytest.raises(TypeError, match="masks are booleans"):
        save_safetensors(tmp_path / "file", PARAMS, masks=PARAMS)
    assert (tmp_path / "file").read_bytes() == content      # what failed wrote nothing
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)      # as where it is not installed
    with pytest.raises(ImportError, match=r"pip install 'pkjax\[safetensors\]'"):
        save_safetensors(tmp_path / "file", PARAMS)


def test_leaves_come_back_in_the_types_in_which_jax_holds_them(tmp_path):
    params = {"a": np.array([0.1, 2.0]), "b": 1.5}      # float64 on the host, whatever JAX holds
    with jax.enable_x64(False):
        save_safetensors(tmp_path / "file", params)
        assert same(load_safetensors(tmp_path / "file", like=params).params, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize(("name", "leaf", "error", "message"), [
    ("a", jnp.ones(2, jnp.float8_e4m3fn), TypeError, "leaf 'a' is float8_e4m3fn, which cannot be read back"),
    ("a", jnp.ones(2, jnp.int4), TypeError, "leaf 'a' is int4, .* convert it to one of bool, int8"),
    ("a", jax.random.key(0), TypeError, "leaf 'a' is key"),
    ("__metadata__", jnp.ones(2), ValueError, "'__metadata__', which safetensors files keep for themselves")])
def test_what_could_not_be_read_back_is_not_written(tmp_path, name, leaf, error, message):
    with pytest.raises(error, match=message):
        save_safetensors(tmp_path / "file", {name: leaf})
    assert not (tmp_path / "file").exists()
