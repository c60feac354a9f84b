"""The names under saliency, pruning and dynamics, each called as the interface is written, in one list."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from flax import nnx

from tests.cases import normal


@pytest.fixture(scope="module")
def case():
    module = pk.models.fc(width=6, depth=2)
    apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 5), jnp.float32)))
    X = normal(1, (4, 5), jnp.float32)
    labels = jnp.arange(4)

    def loss_fn(p):
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, X), labels).mean()

    return apply_fn, params, X, loss_fn


SCORES = {
    "random": lambda apply_fn, params, X, loss_fn: pk.random(params, key=jax.random.key(0)),
    "magnitude": lambda apply_fn, params, X, loss_fn: pk.magnitude(params),
    "snip": lambda apply_fn, params, X, loss_fn: pk.snip(loss_fn, params),
    "grasp": lambda apply_fn, params, X, loss_fn: pk.grasp(loss_fn, params, prunable=pk.kernels),
    "synflow": lambda apply_fn, params, X, loss_fn: pk.synflow(apply_fn, params, pk.ones_input((5,)), pool="sum"),
    "synflow dist": lambda apply_fn, params, X, loss_fn: pk.synflow(apply_fn, params, pk.mean_input(jnp.abs(X))),
    **{f"synflow_l2 {variant}": lambda apply_fn, params, X, loss_fn, variant=variant: pk.synflow_l2(
        apply_fn, params, pk.ones_input((5,)), variant=variant, pool="sum")
       for variant in ("paper", "conserved", "released")},
    "path_exclusion": lambda apply_fn, params, X, loss_fn: pk.path_exclusion(apply_fn, params, X, pool="sum"),
    "path_magnitude": lambda apply_fn, params, X, loss_fn: pk.path_magnitude(apply_fn, params, pk.ones_input((5,))),
    "ntk_trace_saliency": lambda apply_fn, params, X, loss_fn: pk.ntk_trace_saliency(apply_fn, params, X),
    "ntk_sap": lambda apply_fn, params, X, loss_fn: pk.ntk_sap(apply_fn, params, (5,), key=jax.random.key(0)),
    "fisher": lambda apply_fn, params, X, loss_fn: pk.fisher(lambda p, x: apply_fn(p, x).mean(), params, [X]),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_trees_like_the_parameters(case, name):
    scores, params = SCORES[name](*case), case[1]
    assert jax.tree.structure(scores) == jax.tree.structure(params)
    assert all(np.isfinite(s).all() and s.shape == p.shape
               for s, p in zip(jax.tree.leaves(scores), jax.tree.leaves(params), strict=True))


def test_what_is_pruned_is_saved_and_loaded_and_stays_zero_in_training(case, tmp_path):
    _, params, _, loss_fn = case
    result = pk.prune(lambda p: pk.snip(loss_fn, p), params, compression=None, density=0.4, steps=1,
                      schedule=pk.exponential, scope=pk.global_scope, prunable=pk.kernels, progress=False)
    assert result.kept == round(0.4 * result.total) == sum(layer.kept for layer in result.layers)
    assert all(layer.emptied == (layer.kept == 0) and layer.total and layer.shape for layer in result.layers)
    path = tmp_path / "masks.npz"
    pk.save_masks(path, result.masks)
    masks = pk.load_masks(path, like=params)
    jax.tree.map(np.testing.assert_array_equal, masks, result.masks)
    optimizer = pk.masked(optax.adam(0.1), masks)
    sparse = pk.apply_masks(params, masks)
    with jax.numpy_dtype_promotion("standard"):  # Adam's step counter
        updates, _ = optimizer.update(jax.grad(loss_fn)(sparse), optimizer.init(sparse), sparse)
        trained = optax.apply_updates(sparse, updates)
    for mask, before, after in zip(*map(jax.tree.leaves, (masks, sparse, trained)), strict=True):
        assert not np.asarray(after)[~np.asarray(mask)].any()
        assert (np.asarray(before) != np.asarray(after)).any()


def test_training_is_solved_from_the_kernel_and_forecast_from_the_trace(case):
    apply_fn, params, X, _ = case
    theta, f0 = pk.ntk(apply_fn, params, X), apply_fn(params, X)
    y = jnp.eye(*f0.shape, dtype=f0.dtype)
    run = pk.dynamics.linearized(theta, f0, y, learning_rate=0.1, t=jnp.arange(4))
    assert run.outputs.shape == run.coefficients.shape == (4, *f0.shape)
    assert run.weight_change[0] == 0 < run.weight_change[1]
    trace_pi = pk.path_kernel.trace(apply_fn, params, pk.ones_input((5,)))
    start = pk.dynamics.forecast(trace_pi, learning_rate=0.001, t=0, a=2.0, b=0.5)
    assert pk.dynamics.forecast(trace_pi, learning_rate=0.001, t=0, a=2.0, b=None) == 0
    assert start == 0.5


MODELS = {
    "vit_tiny": lambda rngs: pk.models.vit_tiny(classes=10, image=32, channels=3, patch=4, depth=12, width=192, heads=3,
                                                param_dtype=jnp.float32, rngs=rngs),
    "mlp_mixer": lambda rngs: pk.models.mlp_mixer(classes=10, image=32, channels=3, patch=4, depth=8, width=64,
                                                  token_width=32, channel_width=256, rngs=rngs),
    "convnext_tiny": lambda rngs: pk.models.convnext_tiny(classes=10, channels=3, patch=2, depths=(1, 1),
                                                          widths=(8, 16), layer_scale=1e-6, rngs=rngs),
    "gpt": lambda rngs: pk.models.gpt(vocabulary=10, context=32, depth=2, width=16, heads=2, last=True, rngs=rngs),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_map_a_batch_to_logits(name):
    def logits(x):
        return MODELS[name](nnx.Rngs(0))(x)

    batch = jax.ShapeDtypeStruct((2, 32), jnp.int32) if name == "gpt" else jax.ShapeDtypeStruct(
        (2, 32, 32, 3), jnp.float32)
    assert nnx.eval_shape(logits, batch).shape == (2, 10)
