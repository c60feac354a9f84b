"""Networks that compute in a type of their own, as Flax's recurrent layers do, whatever they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import normal

PARAMS = {"i": normal(0, (3, 2), np.float32), "h": normal(1, (2, 2), np.float32), "o": normal(2, (2, 2), np.float32)}
MASKS = {"i": normal(4, (3, 2)) > -1, "h": jnp.ones((2, 2), bool), "o": jnp.ones((2, 2), bool)}
X = normal(3, (2, 3, 3), np.float32)
ONES = jnp.ones((1, 3, 3), np.float32)


def recurrent(state):
    """A network over three steps, which begins at zeros of a type."""
    def net(p, x):
        h, _ = jax.lax.scan(lambda h, v: (jax.nn.relu(v @ p["i"] + h @ p["h"]), None),
                            jnp.zeros((len(x), 2), state), x.swapaxes(0, 1))
        return h @ p["o"]
    return net


TYPES = np.float32, np.float64


def case(dtype, *trees):
    """The network that computes in a type, and these trees in it."""
    return (recurrent(dtype), *jax.tree.map(lambda v: v.astype(dtype), trees))


CALLS = {
    "log_count": lambda f, p, x, X: pk.paths.log_count(f, p, x),
    "norm": lambda f, p, x, X: pk.paths.norm(f, p, x),
    "distance": lambda f, p, x, X: pk.paths.distance(f, p, x, MASKS),
    "change_bound": lambda f, p, x, X: pk.paths.change_bound(f, p, X, masks=MASKS),
    "connectivity": lambda f, p, x, X: [(layer.kept, layer.flow) for layer in pk.connectivity(f, p, x).layers],
    "effective_units": lambda f, p, x, X: [unit.participation for unit in pk.effective_units(f, p, x)],
    "on_paths": lambda f, p, x, X: pk.on_paths(f, p, x),
    "eigenvalues": lambda f, p, x, X: pk.path_kernel.eigenvalues(f, p, x, k=3),
    "analyze": lambda f, p, x, X: [(r := pk.analyze(f, p, X, x=x)).nu, r.trace_pi],
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_of_the_network_in_double_precision(name):
    found, wanted = (jax.tree.leaves(CALLS[name](*case(dtype, PARAMS, ONES, X))) for dtype in TYPES)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bounds_of_eigenvalues_are_as_wide_as_the_type_is_coarse():
    single, double = (pk.path_kernel.eigenpairs(*case(dtype, PARAMS, ONES), k=3) for dtype in TYPES)
    assert np.all(np.abs(single.values - double.values) <= single.bounds)
    assert single.bounds[0] > 1e-7 * single.values[0] > 1e6 * double.bounds[0]


def test_what_fails_in_any_type_is_told_in_the_callers():
    with pytest.raises(ValueError, match=r"failed on a batch of 1, float32\[1, 3, 3\]"):
        pk.paths.log_count(recurrent(np.float16), PARAMS, ONES)
