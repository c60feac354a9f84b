"""Masks: exact zeros, and files that come back or complain."""

import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.pruning.masks import apply_masks, load_masks, save_masks


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
