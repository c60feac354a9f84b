"""Masks: exact zeros, and files that come back or complain."""

import collections
import io
import json
import re
import stat
import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from pkjax.pruning.masks import apply_masks, load_masks, save_masks
from pkjax.trees import leaf_names


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": jnp.asarray(rng.normal(size=(5, 7))), "bias": jnp.asarray(rng.normal(size=7))},
        "last": {"kernel": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)},
    }


@pytest.fixture
def masks(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < 0.4), params)


def bits(leaf):
    """The raw bits, in which −0 differs from +0."""
    return np.asarray(leaf).view(f"u{np.asarray(leaf).itemsize}")


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_masked_weights_are_plus_zero_whatever_they_held(transform, params, masks):
    poison = jax.tree.map(lambda p: p.at[0].set(-0.0).at[1].set(jnp.nan).at[2].set(jnp.inf), params)
    result = transform(apply_masks)(poison, masks)
    for before, mask, after in zip(*map(jax.tree.leaves, (poison, masks, result)), strict=True):
        assert after.dtype == before.dtype
        assert (bits(after)[~np.asarray(mask)] == 0).all()
        assert (bits(after)[np.asarray(mask)] == bits(before)[np.asarray(mask)]).all()


def test_masks_that_do_not_fit_are_refused(params, masks):
    with pytest.raises(ValueError, match="leaf 'last/kernel' is missing"):
        apply_masks(params, {"first": masks["first"]})
    with pytest.raises(ValueError, match=r"'last/kernel' has shape \(2, 3\)"):
        apply_masks(params, {**masks, "last": {"kernel": jnp.ones((2, 3), bool)}})
    with pytest.raises(TypeError, match="masks leaf 'last/kernel' has dtype float32"):
        apply_masks(params, {**masks, "last": {"kernel": jnp.ones((7, 3), jnp.float32)}})


def test_gradients_pass_through_apply_masks_only_where_weights_are_kept(params, masks):
    gradient = jax.grad(
        lambda p: sum(jnp.sum(v.astype(float)) for v in jax.tree.leaves(apply_masks(p, masks)))
    )
    for got, mask in zip(*map(jax.tree.leaves, (gradient(params), masks)), strict=True):
        assert (np.asarray(got) == np.asarray(mask)).all()


def test_masks_come_back_from_a_file_bit_for_bit(tmp_path, params, masks):
    masks["scalar"], params["scalar"] = jnp.array(True), jnp.array(0.5)
    masks["empty"], params["empty"] = jnp.ones((0, 3), bool), jnp.ones((0, 3))
    save_masks(tmp_path / "masks.npz", masks)
    loaded = load_masks(str(tmp_path / "masks.npz"), like=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for want, got in zip(*map(jax.tree.leaves, (masks, loaded)), strict=True):
        assert got.dtype == bool
        assert got.shape == want.shape
        assert (np.asarray(got) == np.asarray(want)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["masks.npz"]


def test_a_file_of_masks_costs_a_bit_a_weight_and_holds_no_pickle(tmp_path):
    noise = np.random.default_rng(0).random((1000, 1000)) < 0.5  # cannot be compressed
    save_masks(tmp_path / "masks.npz", {"kernel": jnp.asarray(noise)})
    assert (tmp_path / "masks.npz").stat().st_size < 1.02 * noise.size / 8 + 1000
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as file:
        assert all(file[name].dtype == np.uint8 for name in file.files)


def test_a_saved_file_is_as_readable_as_any_other(tmp_path, masks):
    (tmp_path / "plain").write_bytes(b"")
    save_masks(tmp_path / "masks.npz", masks)
    mode = stat.S_IMODE((tmp_path / "masks.npz").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, params, masks, monkeypatch):
    target = tmp_path / "masks.npz"
    save_masks(target, masks)
    before = target.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        save_masks(target, jax.tree.map(jnp.logical_not, masks))
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["masks.npz"]


def test_what_is_no_mask_is_not_saved(tmp_path, params):
    with pytest.raises(TypeError, match="first/bias"):
        save_masks(tmp_path / "masks.npz", params)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused_wherever_they_are_cut_or_altered(tmp_path, params, masks):
    """Cut anywhere: always refused. Altered anywhere: refused, or (in unused bytes of the zip) read unchanged."""
    good = tmp_path / "masks.npz"
    save_masks(good, masks)
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for cut in range(0, len(content), 41):
        bad.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"bad\.npz' is not a readable file of masks"):
            load_masks(bad, like=params)
    refused = 0
    for position in range(0, len(content), 7):
        altered = bytearray(content)
        altered[position] ^= 0xFF
        bad.write_bytes(bytes(altered))
        try:
            loaded = load_masks(bad, like=params)
        except ValueError:
            refused += 1
        else:
            for want, got in zip(*map(jax.tree.leaves, (masks, loaded)), strict=True):
                assert (np.asarray(got) == np.asarray(want)).all()
    assert refused > 50


def test_files_that_are_something_else_are_refused(tmp_path, params, masks):
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "absent.npz", like=params)
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="not a readable file of masks"):
        load_masks(tmp_path / "other.npz", like=params)
    np.save(tmp_path / "plain.npy", np.ones(3))
    with pytest.raises(ValueError, match="not a readable file of masks"):
        load_masks(tmp_path / "plain.npy", like=params)
    (tmp_path / "notes.txt").write_text("no masks here")
    with pytest.raises(ValueError, match=r"notes\.txt' is not a readable file of masks: it is not an npz archive"):
        load_masks(tmp_path / "notes.txt", like=params)
    np.savez(tmp_path / "pickled.npz", header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a readable file of masks"):
        load_masks(tmp_path / "pickled.npz", like=params)


def test_masks_of_another_network_are_refused_by_name(tmp_path, params, masks):
    save_masks(tmp_path / "masks.npz", masks)
    with pytest.raises(ValueError, match="no leaf 'last/bias'"):
        load_masks(tmp_path / "masks.npz", like={**params, "last": {**params["last"], "bias": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"shape \(7, 3\) at leaf 'last/kernel', where like has \(7, 4\)"):
        load_masks(tmp_path / "masks.npz", like={**params, "last": {"kernel": jnp.ones((7, 4))}})
    with pytest.raises(ValueError, match="leaf 'last/kernel', which like does not have"):
        load_masks(tmp_path / "masks.npz", like={"first": params["first"]})


@pytest.mark.parametrize("tree", [
    {"a/b": [True, False], "a": {"b": [False, True]}}, {"a\\": [True], "a": {"\\": [False]}, "": [True, True]},
    {"": {"": [True]}, "/": [False]}, {"..": {"..": [True, False]}, "/etc/passwd": [False]},
    {"\u00e9": [True], "e\u0301": [False], "π→\ud800": [True]},
    {"header": [True], "bits_0": [False], "bits_1.npy": [True]},
    {"(root)": [True]}, [[True], {"0": [False]}], {1: [True, False], 0: [False]}, {"A": [True], "a": [False]}, [True]],
    ids=repr)
def test_leaves_of_any_names_come_back_to_their_places(tree, tmp_path):
    masks = jax.tree.map(lambda bits: np.array(bits), tree, is_leaf=lambda x: isinstance(x, list) and x[0] in (0, 1))
    save_masks(tmp_path / "masks", masks)
    loaded = load_masks(tmp_path / "masks", like=jax.tree.map(lambda m: m.astype(np.float32), masks))
    assert jax.tree.structure(loaded) == jax.tree.structure(masks)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, masks))
    assert [file.name for file in tmp_path.iterdir()] == ["masks"]


def test_leaves_that_no_name_tells_apart_are_refused(tmp_path):
    masks = collections.OrderedDict([(1, np.array([True])), ("1", np.array([False]))])
    with pytest.raises(ValueError, match=r"masks has two leaves under the keys '1', which their names cannot tell"):
        save_masks(tmp_path / "masks.npz", masks)
    assert list(tmp_path.iterdir()) == []


def write_first_format(path, layers, bits):
    header = np.frombuffer(json.dumps({"format": "pkjax masks 1", "layers": layers}).encode(), np.uint8)
    np.savez(path, header=header, **{f"bits_{i}": np.packbits(b) for i, b in enumerate(bits)})


def test_files_of_the_first_format_are_read_where_their_names_are_one_trees_alone(tmp_path):
    write_first_format(tmp_path / "old.npz", [["a/b", [3]], ["c/0", [2]]], [[1, 0, 1], [0, 1]])
    loaded = load_masks(tmp_path / "old.npz", like={"a": {"b": np.ones(3)}, "c": [np.ones(2)]})
    assert (loaded["a"]["b"].tolist(), loaded["c"][0].tolist()) == ([True, False, True], [False, True])
    write_first_format(tmp_path / "root.npz", [["(root)", [2]]], [[0, 1]])
    assert load_masks(tmp_path / "root.npz", like=np.ones(2)).tolist() == [False, True]
    write_first_format(tmp_path / "twice.npz", [["a/b", [2]], ["a/b", [2]]], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="does not tell leaves of like apart"):
        load_masks(tmp_path / "twice.npz", like={"a/b": np.ones(2), "a": {"b": np.ones(2)}})
    with pytest.raises(ValueError, match="the file has two leaves under the keys 'a' → 'b'"):
        load_masks(tmp_path / "twice.npz", like={"a": {"b": np.ones(2)}})
    for name in (5, None, ["a"]):
        write_first_format(tmp_path / "crafted.npz", [[name, [2]]], [[1, 0]])
        with pytest.raises(ValueError, match="not a readable file of masks: the name of a leaf is not a string"):
            load_masks(tmp_path / "crafted.npz", like={"a": np.ones(2)})


def craft(path, header, members, *, declared=None):
    """An archive of a header, of members {name: bytes} as they are, and of one whose size is not what it declares."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"header.npy": npy(json.dumps(header).encode()), **members}.items():
            archive.writestr(name, content)
    if declared:
        content = path.read_bytes()
        place = content.rindex(b"PK\x01\x02")       # the last member's entry in the directory
        path.write_bytes(content[:place + 24] + struct.pack("<I", declared) + content[place + 28:])


def npy(content, shape=None, dtype="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False,
                                               "shape": (len(content),) if shape is None else shape})
    return out.getvalue() + content


HEADER = {"format": "pkjax masks 2", "layers": [[["a"], [8]]]}
BOMB = npy(bytes(2**28))


@pytest.mark.parametrize(("header", "members", "declared"), [
    (HEADER, {"bits_0.npy": BOMB}, None),
    (HEADER, {"bits_0.npy": BOMB}, 129),                                  # it unpacks to more than it declares
    (HEADER, {"bits_0.npy": npy(b"\xff", shape=(2**40,))}, None),
    (HEADER, {"bits_0.npy": npy(b"\xff", shape=(1, 1))}, None),
    (HEADER, {"bits_0.npy": npy(b"\xff" * 8, dtype="<u8", shape=(1,))}, None),
    (HEADER, {"bits_0.npy": npy(b"\xff", dtype="|O")}, None),
    (HEADER, {}, None),
    ({**HEADER, "layers": [[["a"], [2**40, 2**40]]]}, {"bits_0.npy": BOMB}, None),
    ({**HEADER, "layers": [[["a"], [-8]]]}, {"bits_0.npy": npy(b"\xff")}, None),
    ({**HEADER, "layers": [[["a"], [8.0]]]}, {"bits_0.npy": npy(b"\xff")}, None),
    ({**HEADER, "layers": [[["a"], [True, 8]]]}, {"bits_0.npy": npy(b"\xff")}, None),
    ({**HEADER, "layers": [[["a"], [8]], [["a"], [8]]]}, {"bits_0.npy": npy(b"\xff"), "bits_1.npy": npy(b"\0")}, None),
    ({**HEADER, "layers": [["a", [8]]]}, {"bits_0.npy": npy(b"\xff")}, None),
    ({**HEADER, "layers": [[[1], [8]]]}, {"bits_0.npy": npy(b"\xff")}, None),
    ({**HEADER, "layers": 3}, {}, None), ([HEADER], {}, None), ({**HEADER, "format": "pkjax masks 9"}, {}, None),
    ({**HEADER, "more": [[] for _ in range(2**19)]}, {"bits_0.npy": npy(b"\xff")}, None)])
def test_crafted_files_are_refused_before_they_are_unpacked(tmp_path, header, members, declared):
    craft(tmp_path / "bad.npz", header, members, declared=declared)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bad\.npz' (is not a readable file of masks|are of another network)"):
            load_masks(tmp_path / "bad.npz", like={"a": np.ones(8)})
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_foreign_members_are_not_unpacked(tmp_path):
    craft(tmp_path / "masks.npz", HEADER, {"bits_0.npy": npy(b"\xf0"), "weights.npy": BOMB, "../../x": b"1"})
    tracemalloc.start()
    try:
        loaded = load_masks(tmp_path / "masks.npz", like={"a": np.ones(8)})
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert loaded["a"].tolist() == [True] * 4 + [False] * 4


TWINS = {"a": {"b": np.ones((3, 2))}, "a/b": np.ones((3, 2))}


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 2), (3, 1), (1, 1), (3, 2, 1), (2, 3)])
@pytest.mark.parametrize("place", ["a", "a/b"])
def test_masks_are_never_broadcast(shape, place, tmp_path):
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), TWINS)
    masks[place] = {"b": np.ones(shape, bool)} if place == "a" else np.ones(shape, bool)
    save_masks(tmp_path / "masks.npz", masks)
    wrong = re.escape(str(shape))
    calls = {
        "apply_masks": lambda: apply_masks(TWINS, masks),
        "load_masks": lambda: load_masks(tmp_path / "masks.npz", TWINS),
        "prune": lambda: pk.prune(pk.magnitude, TWINS, density=0.5, masks=masks),
        "ntk": lambda: pk.ntk(lambda w, x: x @ w["a"]["b"] @ w["a/b"].T, TWINS, np.ones((1, 3)), masks=masks)}
    if shape:     # one boolean stands for a whole leaf there
        calls["masked"] = lambda: pk.masked(optax.sgd(0.1), masks).init(TWINS)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=wrong):
            print(name, call())


def test_an_array_of_booleans_stands_for_one_leaf_and_not_for_a_subtree():
    params = {"norm": {"bias": np.ones(3), "scale": np.ones(3)}}
    with pytest.raises(ValueError, match="give one boolean for all of them"):
        pk.masked(optax.sgd(0.1), {"norm": np.ones(3, bool)}).init(params)
    assert pk.masked(optax.sgd(0.1), {"norm": np.False_}).init(params) is not None


def test_trees_with_equal_leaf_names_lose_no_leaf(tmp_path):
    masks = {"a": {"b": np.array([True, False])}, "a/b": np.array([False, True]), "c": np.array([True, True])}
    params = jax.tree.map(lambda m: np.array([2.0, 3.0]), masks)
    assert len(set(leaf_names(masks))) == 3
    kept = apply_masks(params, masks)
    assert (kept["a"]["b"].tolist(), kept["a/b"].tolist()) == ([2.0, 0.0], [0.0, 3.0])
    with pytest.raises(ValueError, match="is missing"):
        apply_masks(params, {"a/b": masks["a/b"], "c": masks["c"]})
    result = pk.prune(pk.magnitude, params, density=0.5, prunable=None)
    assert len({layer.name for layer in result.layers}) == 3
    optimizer = pk.masked(optax.sgd(1.0), masks)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert np.asarray(updates["a"]["b"]).tolist() == [-2.0, -3.0]
    assert np.asarray(updates["a/b"]).tolist() == [-2.0, -3.0]


@pytest.mark.parametrize("name", ["z[red].npz", "masks", "$\\frac$.npz", "a" * 220 + ".npz", "é" * 100, ".npz"])
def test_file_names_are_taken_as_they_are(tmp_path, name):
    masks = {"a": np.array([True, False])}
    save_masks(tmp_path / name, masks)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert load_masks(tmp_path / name, like=masks)["a"].tolist() == [True, False]


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 2), (2, 3)])
def test_choices_of_entries_are_never_broadcast_either(shape):
    params = {"a": np.ones((3, 2))}
    choice = {"a": np.ones(shape, bool)}
    with pytest.raises(ValueError, match=rf"trainable leaf 'a' has shape {re.escape(str(shape))}, but params has"):
        pk.ntk_trace(lambda w, x: x @ w["a"], params, np.ones((1, 3)), trainable=choice)
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        pk.prune(pk.magnitude, params, density=0.5, prunable=choice)
