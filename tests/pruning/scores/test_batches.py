"""Streams of batches: PyTorch's loaders are read, and what is not a batch of numbers is named."""

import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.pruning.scores.batches import checked

from tests.cases import unchecked

PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))}
X, Y = (np.random.default_rng(1).normal(size=(6, n)) for n in (3, 2))


def loss(p, batch):
    images, labels = batch
    return ((images @ p["kernel"] - labels) ** 2).mean()


class Tensor:
    """An array of another library."""

    def __init__(self, values, error=None):
        self.values, self.error = values, error

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise RuntimeError(self.error)
        return self.values


def test_pytorchs_loader_gives_the_scores_of_its_arrays():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    arrays = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    for score in (pk.snip, pk.grasp):
        np.testing.assert_array_equal(score(loss, PARAMS, loader)["kernel"], score(loss, PARAMS, arrays)["kernel"])
    inputs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X)), batch_size=4)

    def net(p, x):
        return x @ p["kernel"]

    np.testing.assert_allclose(pk.path_exclusion(net, PARAMS, inputs)["kernel"],
                               pk.path_exclusion(net, PARAMS, X)["kernel"], rtol=1e-12)
    with pytest.raises(ValueError, match=r"X: batch 0 holds 2 arrays.*pass \[images for images, labels in X\]"):
        pk.path_exclusion(net, PARAMS, loader)
    tracked = torch.utils.data.DataLoader(torch.tensor(X, requires_grad=True), batch_size=4)
    with pytest.raises(TypeError, match=r"batch 0, field '\(root\)', is a Tensor that NumPy cannot read: .*grad"):
        pk.snip(loss, PARAMS, tracked)


def test_arrays_of_other_libraries_are_read():
    batches = [(Tensor(X[:4]), Tensor(Y[:4])), [Tensor(X[4:]), Tensor(Y[4:])]]
    np.testing.assert_array_equal(pk.snip(loss, PARAMS, batches)["kernel"],
                                  pk.snip(loss, PARAMS, [(X[:4], Y[:4]), [X[4:], Y[4:]]])["kernel"])


@pytest.mark.parametrize(("batches", "message"), [
    ([{"x": X, "name": np.array(["a"] * 6)}], r"batches, batch 0, field 'name', holds text"),
    ([{"x": X}, {"x": X, "name": ["a"] * 6}], r"batches, batch 1, field 'name/0', holds text"),
    ([(X, np.array([None] * 6))], r"batches, batch 0, field '1', holds ndarray of object"),
    ([(X, Tensor(Y, "on another device"))], r"field '1', is a Tensor that NumPy cannot read: on another device"),
])
def test_fields_that_hold_no_numbers_are_named(batches, message):
    with pytest.raises(TypeError, match=message):
        list(checked(batches, "batches"))
    with pytest.raises(TypeError, match=message):
        pk.snip(lambda p, batch: (p["kernel"] ** 2).sum(), PARAMS, batches)


def test_a_generator_is_read_once_and_says_so():
    def stream():
        yield X, Y

    batches = stream()
    np.testing.assert_array_equal(pk.snip(loss, PARAMS, batches)["kernel"],
                                  pk.snip(loss, PARAMS, [(X, Y)])["kernel"])
    with pytest.raises(ValueError, match="batches holds no batch: a generator can be read only once; pass a list"):
        pk.snip(loss, PARAMS, batches)
    with pytest.raises(ValueError, match="batches holds no batch: a generator can be read only once"):
        pk.prune(lambda p: pk.snip(loss, p, batches), PARAMS, density=0.5)
    with pytest.raises(TypeError, match="grasp reads batches twice, but a generator can be read only once"):
        pk.grasp(loss, PARAMS, stream())
    with pytest.raises(TypeError, match="batches must be an iterable of batches, got a function"):
        next(unchecked(checked)(stream, "batches"))
