"""The kernel's change along a training, against kernels of the trained networks by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from flax import linen, nnx
from pkjax.training import Recipe, fit, kernel_change

SHORT = Recipe(learning_rate=0.02, epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    return pk.data.load("digits", samples=64)


def theta(module, result, x, masks=None):
    apply_fn, params = pk.from_linen(module, {"params": result.params, **result.state})
    return np.asarray(pk.ntk(apply_fn, params, x, masks=masks), np.float64).ravel()


def test_the_history_has_the_norms_of_the_differences(digits, tmp_path):
    module, x = pk.models.fc(8, 1), digits.images[:3]
    variables = module.init(jax.random.key(5), x)
    masks = pk.prune(pk.magnitude, variables["params"], density=0.5).masks
    start = {"variables": variables, "masks": masks}
    measure = kernel_change(module, x, **start)
    first = fit(module, digits, digits, recipe=SHORT, epochs=0, **start)
    done = fit(module, digits, digits, recipe=SHORT, measure=measure, checkpoint=tmp_path, **start)
    before, after = (theta(module, result, x, masks) for result in (first, done))
    assert done.history[0]["ntk_change"] == 0.0
    assert done.history[0]["ntk_distance"] < 1e-12
    row = done.history[-1]
    np.testing.assert_allclose(row["ntk_change"], np.linalg.norm(after - before), rtol=1e-4)
    np.testing.assert_allclose(row["ntk_norm"], np.linalg.norm(after), rtol=1e-5)
    cosine = after @ before / np.linalg.norm(after) / np.linalg.norm(before)
    np.testing.assert_allclose(row["ntk_distance"], 1 - cosine, rtol=1e-3)


def test_a_training_that_stopped_resumes_with_a_measure_built_anew(digits, tmp_path):
    module = pk.models.fc(4, 1)

    def train(**options):
        return fit(module, digits, digits, recipe=SHORT, seed=3, **options,
                   measure=kernel_change(module, digits.images[:2], seed=3)).history

    def changes(history):
        return [row["ntk_change"] for row in history]

    train(checkpoint=tmp_path, epochs=1)
    assert changes(train(checkpoint=tmp_path)) == changes(train())


def test_an_nnx_module_is_measured_from_where_it_stands(digits):
    model = pk.models.nnx_fc(64, width=4, depth=1, rngs=nnx.Rngs(0))
    measure = kernel_change(model, digits.images[:2])
    start, end = fit(model, digits, digits, recipe=SHORT, epochs=1, measure=measure).history
    assert start["ntk_change"] == 0.0
    assert abs(end["ntk_norm"] - start["ntk_norm"]) < end["ntk_change"]
    assert end["ntk_change"] < end["ntk_norm"] + start["ntk_norm"]


def test_a_kernel_of_0_has_a_change_and_is_as_far_as_can_be_from_any_other():
    class Linear(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1, use_bias=False)(x * self.param("scale", linen.initializers.zeros, ()))
    module, x = Linear(), np.ones((1, 2))
    zero = {"scale": jnp.zeros(()), "Dense_0": {"kernel": jnp.zeros((2, 1))}}
    other = {"scale": jnp.ones(()), "Dense_0": {"kernel": jnp.ones((2, 1))}}
    distances = [[measure(params, {})["ntk_distance"].item() for params in (zero, other)] for measure in
                 (kernel_change(module, x, variables={"params": first}) for first in (zero, other))]
    np.testing.assert_allclose(distances, [[0, 1], [1, 0]], atol=1e-6)
    measured = kernel_change(module, x, variables={"params": zero})(zero, {})
    assert (measured["ntk_change"], measured["ntk_norm"]) == (0, 0)


def test_what_is_not_a_flax_module_is_refused(digits):
    with pytest.raises(TypeError, match="training takes a Linen or NNX module"):
        kernel_change(lambda p, x: x @ p, digits.images[:2])
