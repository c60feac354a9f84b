"""Data are what their publishers made: sizes, pixel statistics and labels known from elsewhere."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pkjax import data

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "unpack"


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    if not SHARED.exists():
        pytest.skip(f"no packed data sets beside the repository ({SHARED})")
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([SHARED, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def test_digits_are_scikit_learns_and_the_splits_part_them():
    from sklearn.datasets import load_digits

    train, test = (data.load(split=split, normalize=False) for split in ("train", "test"))
    assert len(train.labels) + len(test.labels) == 1797
    both = np.concatenate([train.images, test.images]).reshape(1797, 64) * 16
    want = load_digits().data
    np.testing.assert_array_equal(both[np.lexsort(both.T)], want[np.lexsort(want.T)])
    assert train.images.dtype == np.float32
    assert train.images.max() == 1
    assert np.bincount(test.labels).min() >= 30          # every digit is in both


def test_normalised_digits_have_mean_zero_and_deviation_one():
    train = data.load("digits")
    assert abs(train.images.mean()) < 1e-6
    assert abs(train.images.std() - 1) < 1e-6
    np.testing.assert_array_equal(train.raw, data.load("digits", normalize=False).images)


def test_a_seed_fixes_the_samples_and_a_shorter_choice_is_its_beginning():
    full = data.load("digits")
    some, again, fewer, other = (data.load("digits", samples=n, seed=s) for n, s in
                                 ((32, 3), (32, 3), (8, 3), (32, 4)))
    np.testing.assert_array_equal(some.images, again.images)
    np.testing.assert_array_equal(some.images[:8], fewer.images)
    assert not np.array_equal(some.images, other.images)
    rows = {(image.tobytes(), int(label)) for image, label in zip(full.images, full.labels, strict=True)}
    chosen = {(image.tobytes(), int(label)) for image, label in zip(some.images, some.labels, strict=True)}
    assert len(chosen) == 32                             # without repetition, each with its own label
    assert chosen <= rows


@pytest.mark.parametrize(("name", "shape", "mean", "std"), [
    ("mnist", (28, 28, 1), 0.1307, 0.3081), ("cifar10", (32, 32, 3), (0.4914, 0.4822, 0.4465),
                                             (0.2470, 0.2435, 0.2616))])
def test_tfds_images_have_the_statistics_of_the_literature(tfds_dir, name, shape, mean, std):
    raw = data.load(name, split="train", samples=2000, data_dir=tfds_dir, normalize=False)
    assert raw.images.shape == (2000, *shape)
    np.testing.assert_allclose(raw.images.mean((0, 1, 2)), mean, atol=0.015)
    np.testing.assert_allclose(raw.images.std((0, 1, 2)), std, atol=0.015)
    assert set(raw.labels) == set(range(10))
    assert raw.classes == 10
    normal = data.load(name, split="train", samples=2000, data_dir=tfds_dir)
    np.testing.assert_allclose(normal.images.std((0, 1, 2)), 1, atol=0.06)
    np.testing.assert_allclose(normal.raw, raw.images, rtol=1e-6)


def test_mnist_is_read_from_the_environments_folder_and_is_mnist(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    test = data.load("mnist", split="test", normalize=False, download=False)
    # Class sizes of the MNIST test set (LeCun et al., 1998).
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    by_class = [test.images[test.labels == k].mean() for k in (0, 1)]
    assert by_class[1] < 0.6 * by_class[0]               # ones have the least ink, zeros the most


def test_loading_tfds_data_imports_no_tensorflow(tfds_dir):
    code = ("import sys, pkjax.data; "
            f"pkjax.data.load('mnist', split='test', samples=3, data_dir={str(tfds_dir)!r}); "
            "sys.exit('tensorflow' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write_tiny_imagenet(folder, *, images=3):
    """Write a Tiny ImageNet of two classes in the publishers' layout; one image is grey."""
    from PIL import Image

    root = folder / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n2\nn1\n")
    for name, level in (("n2", 40), ("n1", 200)):
        place = root / "train" / name / "images"
        place.mkdir(parents=True)
        for i in range(images):
            mode, colour = ("L", level) if i == 0 else ("RGB", (level, level + 10, level + 20))
            Image.new(mode, (64, 64), colour).save(place / f"{name}_{i}.JPEG", quality=100)
    for i in range(2):
        Image.new("RGB", (64, 64), (100, 100, 100)).save(root / "val" / "images" / f"val_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t9\t9\nval_1.JPEG\tn2\t0\t0\t9\t9\n")
    return root


def test_tiny_imagenet_is_read_from_its_publishers_folder(tmp_path):
    root = write_tiny_imagenet(tmp_path)
    train, inside = (data.load("tiny_imagenet", data_dir=where) for where in (tmp_path, root))
    assert train.images.shape == (6, 64, 64, 3)
    assert train.classes == 200
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]                   # in the order of wnids.txt
    np.testing.assert_array_equal(train.pixels, inside.pixels)
    np.testing.assert_allclose(train.pixels.mean((1, 2))[:3], [[40] * 3, [40, 50, 60], [40, 50, 60]], atol=2)
    test = data.load("tiny_imagenet", split="test", data_dir=tmp_path)
    assert test.labels.tolist() == [1, 0]
    np.testing.assert_allclose(test.raw, 100 / 255, atol=0.01)
    np.testing.assert_allclose(test.images * test.std + test.mean, test.raw, atol=1e-6)


def test_a_missing_tiny_imagenet_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tiny_imagenet in .*: download http://cs231n") as info:
        data.load("tiny_imagenet", data_dir=tmp_path)
    assert "\n" not in str(info.value)


def test_unknown_names_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet'; choose from digits, mnist, "):
        data.load("imagenet")
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        data.load("digits", split="valid")
    for samples in (0, 1438):
        with pytest.raises(ValueError, match=f"between 1 and 1437, got {samples}"):
            data.load("digits", samples=samples)


def test_missing_data_says_in_one_line_how_to_get_it(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match=r"no cifar100 in .*: download it .* TFDS_DATA_DIR") as info:
        data.load("cifar100", data_dir=tmp_path, download=False)
    assert "\n" not in str(info.value)

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(tfds, "data_source", offline)
    with pytest.raises(FileNotFoundError, match=r"\(ConnectionError: Name or service not known\)") as info:
        data.load("fashion_mnist", data_dir=tmp_path)
    assert "\n" not in str(info.value)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"which needs PIL: pip install 'pkjax\[data\]'"):
        data.load("mnist")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pkjax\[data\]'"):
        data.load("digits")
