"""Optimizers under masks: pruned weights and their moments are exactly 0, and the others train as if alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from pkjax.adapters import from_linen, from_nnx
from pkjax.pruning.masks import apply_masks, masked
from pkjax.pruning.prune import prune
from pkjax.pruning.scores.data_free import magnitude

STEPS = 100
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(8, n)), jnp.float32) for n in (4, 3))


@pytest.fixture(autouse=True)
def optax_promotion():
    """Let optax mix types, as its own arithmetic does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def filled(tree):
    """Weights in the shapes of a tree, none of them 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, jnp.float32), tree)


@functools.cache
def linen():
    """A network, its parameters before pruning, and masks."""
    module = nn.Sequential([nn.Dense(6), nn.leaky_relu, nn.Dense(3)])
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    apply_fn, params = from_linen(module, filled(shapes))
    return apply_fn, params, prune(magnitude, params, density=0.6).masks


class Network(nnx.Module):
    """Layers in a list: the containers of its state are none of those of a plain tree."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        first, norm, last = self.layers
        return last(nnx.leaky_relu(norm(first(x))))


def fresh_model():
    model = Network(nnx.Rngs(0))
    nnx.update(model, filled(nnx.state(model, nnx.Param)))
    model.eval()
    return model


@functools.cache
def pruned_model():
    """The same for an NNX model: what ``fresh_model`` makes, as a function of a plain tree."""
    apply_fn, params = from_nnx(fresh_model())
    return apply_fn, params, prune(magnitude, params, density=0.6).masks


def mse(out):
    return jnp.mean((out - Y) ** 2)


def trained(optimizer, apply_fn, params, steps=STEPS, state=None):
    """Train in one scan under jit; returns parameters and state."""
    return _train(optimizer, apply_fn, steps, (params, optimizer.init(params) if state is None else state))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(optimizer, apply_fn, steps, carry):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(lambda p: mse(apply_fn(p, X)))(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, None, length=steps)[0]


def bits(leaf):
    """The raw bits, in which −0 differs from +0."""
    return np.asarray(leaf).view(f"u{np.asarray(leaf).itemsize}")


def assert_same_bits(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def assert_only_kept_weights_moved(before, after, masks):
    for old, new, mask in zip(*map(jax.tree.leaves, (before, after, masks)), strict=True):
        mask = np.asarray(mask)
        assert new.dtype == old.dtype
        assert (bits(new)[~mask] == 0).all()
        assert (np.asarray(new)[mask] != np.asarray(old)[mask]).all()


def moments(optimizer, state):
    """The leaves of the state that are like parameters, each tree of them as one list."""
    found = []
    optax.tree_map_params(optimizer, lambda leaf: found.append(leaf) or leaf, state)
    return found


def schedule(count):
    return 0.02 / (1 + 0.1 * count)


OPTIMIZERS = {
    "sgd": (0, lambda: optax.sgd(0.1)),
    "momentum": (1, lambda: optax.sgd(0.05, momentum=0.9, nesterov=True)),
    "adam": (2, lambda: optax.adam(0.01)),
    "adamw": (2, lambda: optax.adamw(0.01, weight_decay=0.1)),
    "lion": (1, lambda: optax.lion(0.01, weight_decay=0.1)),
    "clipped": (2, lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))),
    "decayed": (1, lambda: optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-0.05))),
    "scheduled": (2, lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))),
    "accumulated": (3, lambda: optax.MultiSteps(optax.adam(0.01), 3).gradient_transformation()),
    "injected": (2, lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1)),
}
"""How many moments of each parameter an optimizer keeps, and the optimizer."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linen_network_trains_as_if_its_pruned_weights_were_not_there(name):
    """The oracle is the same optimizer, without masks, on a vector of the kept weights alone."""
    count, make = OPTIMIZERS[name]
    apply_fn, params, masks = linen()
    start = apply_masks(params, masks)
    optimizer = masked(make(), masks)
    after, state = trained(optimizer, apply_fn, start)
    assert_only_kept_weights_moved(start, after, masks)

    flat, unravel = ravel_pytree(start)
    kept = np.flatnonzero(ravel_pytree(masks)[0])
    assert kept.size < flat.size
    alone, _ = trained(make(), lambda w, x: apply_fn(unravel(jnp.zeros_like(flat).at[kept].set(w)), x), flat[kept])
    np.testing.assert_allclose(ravel_pytree(after)[0][kept], alone, rtol=1e-3, atol=1e-4)

    found = moments(optimizer, state)
    assert len(found) == count * len(jax.tree.leaves(params))
    for i, leaf in enumerate(found):
        mask = np.asarray(jax.tree.leaves(masks)[i % len(jax.tree.leaves(masks))])
        assert not np.asarray(leaf)[~mask].any()
        assert np.asarray(leaf)[mask].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_nnx_model_keeps_its_pruned_weights_at_zero(name):
    """nnx.Optimizer hands on states of nnx.Param at first and of arrays later; masks are a plain tree."""
    _, make = OPTIMIZERS[name]
    model = fresh_model()
    apply_fn, params, masks = pruned_model()
    start = apply_masks(params, masks)
    nnx.update(model, start)
    optimizer = nnx.Optimizer(model, masked(make(), masks), wrt=nnx.Param)
    definition, begin = nnx.split((model, optimizer))

    @jax.jit
    def train(begin):
        def step(carry, _):
            model, optimizer = nnx.merge(definition, carry)
            optimizer.update(model, nnx.grad(lambda model: mse(model(X)))(model))
            return nnx.state((model, optimizer)), None

        return jax.lax.scan(step, begin, None, length=STEPS)[0]

    nnx.update((model, optimizer), train(begin))
    assert int(optimizer.step[...]) == STEPS
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_only_kept_weights_moved(start, after, masks)
    if name == "adamw":
        alone, _ = trained(masked(make(), masks), apply_fn, start)
        np.testing.assert_allclose(ravel_pytree(after)[0], ravel_pytree(alone)[0], rtol=1e-3, atol=1e-4)


def test_an_nnx_model_trains_under_nnx_jit_too():
    model = fresh_model()                          # not masked: only the optimizer is
    _, params, masks = pruned_model()
    optimizer = nnx.Optimizer(model, masked(optax.adamw(0.01), masks), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: mse(model(X)))(model))

    for _ in range(3):
        step(model, optimizer)
        assert_only_kept_weights_moved(params, nnx.to_pure_dict(nnx.state(model, nnx.Param)), masks)


@pytest.mark.parametrize(("dtype", "update_dtype"), [
    (jnp.float16, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.float64, jnp.float32)])
def test_one_step_takes_pruned_weights_to_plus_zero_whatever_they_held(dtype, update_dtype):
    info = jnp.finfo(dtype)
    values = jnp.array([0.0, -0.0, 1.001, -3.3, info.max, -info.max, info.tiny, -info.smallest_subnormal, 1.0], dtype)
    masks = jnp.arange(9) == 8
    optimizer = masked(optax.stateless(lambda updates, params: updates.astype(update_dtype)), masks)
    updates, _ = jax.jit(optimizer.update)(jnp.full(9, jnp.nan, dtype).at[8].set(0.5), optimizer.init(values), values)
    after = optax.apply_updates(values, updates)
    assert after.dtype == dtype
    assert (bits(after)[:8] == 0).all()
    assert float(after[8]) == 1.5


def test_what_is_not_finite_is_left_to_apply_masks():
    values, masks = jnp.array([jnp.nan, jnp.inf, 1.0], jnp.float32), jnp.array([False, False, True])
    optimizer = masked(optax.adam(0.1), masks)
    state = optimizer.init(values)
    updates, state = optimizer.update(jnp.ones(3, jnp.float32), state, values)
    assert np.isnan(np.asarray(optax.apply_updates(values, updates))[:2]).all()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
    assert (bits(apply_masks(values, masks))[:2] == 0).all()


def test_without_params_pruned_weights_do_not_move():
    masks = {"kernel": jnp.array([True, False])}
    optimizer = masked(optax.sgd(0.5, momentum=0.9), masks)
    params = {"kernel": jnp.array([1.0, 0.0])}
    updates, _ = optimizer.update({"kernel": jnp.array([1.0, jnp.nan])}, optimizer.init(params))
    assert updates["kernel"].tolist() == [-0.5, 0.0]


def test_weights_that_nobody_masked_reach_neither_state_nor_norms():
    """Weight decay into the momentum, and a trust ratio, which is a norm of the parameters."""
    apply_fn, params, masks = linen()
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale_by_trust_ratio())
    optimizer = masked(inner, masks)
    gradients = jax.tree.map(jnp.ones_like, params)
    (updates, state), (same, clean) = (
        jax.jit(optimizer.update)(gradients, optimizer.init(p), p) for p in (params, apply_masks(params, masks)))
    assert_same_bits(state, clean)
    assert_same_bits(apply_masks(updates, masks), apply_masks(same, masks))
    after, _ = trained(optimizer, apply_fn, params, steps=1)
    assert_only_kept_weights_moved(params, after, masks)


def test_noise_reaches_no_pruned_weight_and_from_outside_no_moment():
    apply_fn, params, masks = linen()
    start = apply_masks(params, masks)
    noise = optax.add_noise(eta=0.1, gamma=0.5, key=jax.random.key(3))
    inner = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01), noise), masks)
    after, (_, state) = trained(optax.chain(noise, inner), apply_fn, start, steps=20)
    assert_only_kept_weights_moved(start, after, masks)
    for leaf, mask in zip(moments(inner, state), 2 * jax.tree.leaves(masks), strict=True):
        assert not np.asarray(leaf)[~np.asarray(mask)].any()


def test_steps_may_be_accumulated_outside_the_mask_too():
    apply_fn, params, masks = linen()
    optimizer = optax.MultiSteps(masked(optax.adamw(0.01), masks), 2).gradient_transformation()
    assert_only_kept_weights_moved(params, trained(optimizer, apply_fn, params, steps=3)[0], masks)


def test_a_nan_gradient_under_the_mask_reaches_nothing():
    _, params, masks = linen()
    optimizer = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), masks)
    poison = jax.tree.map(lambda p, m: jnp.where(m, jnp.ones_like(p), jnp.nan), params, masks)
    start = apply_masks(params, masks)
    updates, state = jax.jit(optimizer.update)(poison, optimizer.init(start), start)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((updates, state)))


INJECTED = {
    "mask outside": lambda masks: masked(optax.inject_hyperparams(optax.adamw)(learning_rate=0.01), masks),
    "mask inside": lambda masks: optax.inject_hyperparams(
        lambda learning_rate: masked(optax.adamw(learning_rate), masks))(learning_rate=0.01),
}


@pytest.mark.parametrize("way", INJECTED)
def test_a_hyperparameter_changed_in_flight_takes_effect(way):
    apply_fn, params, masks = linen()
    start = apply_masks(params, masks)
    optimizer = INJECTED[way](masks)
    middle, state = trained(optimizer, apply_fn, start, steps=5)
    assert_only_kept_weights_moved(start, middle, masks)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    still, state = trained(optimizer, apply_fn, middle, steps=5, state=state)
    assert_same_bits(middle, still)
    state.hyperparams["learning_rate"] = jnp.full_like(state.hyperparams["learning_rate"], 0.02)
    again, _ = trained(optimizer, apply_fn, still, steps=5, state=state)
    assert_only_kept_weights_moved(still, again, masks)


@pytest.mark.parametrize("inner", ["momentum", "adamw", "injected"])
def test_training_goes_on_identically_after_a_checkpoint(inner, tmp_path):
    apply_fn, params, masks = linen()
    optimizer = masked(OPTIMIZERS[inner][1](), masks)
    start = apply_masks(params, masks)
    middle = dict(zip(("params", "state"), trained(optimizer, apply_fn, start, steps=10), strict=True))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", middle)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: {"params": start, "state": optimizer.init(start)})
        restored = checkpointer.restore(tmp_path / "checkpoint", like)
    assert jax.tree.structure(restored) == jax.tree.structure(middle)
    assert_same_bits(restored, middle)
    assert_same_bits(trained(optimizer, apply_fn, restored["params"], steps=10, state=restored["state"]),
                     trained(optimizer, apply_fn, middle["params"], steps=10, state=middle["state"]))


def test_the_state_is_the_optimizers_own_and_optax_finds_the_moments_in_it():
    _, params, masks = linen()
    optimizer = masked(optax.adam(0.1), masks)
    state = optimizer.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adam(0.1).init(params))
    marked = optax.tree_map_params(optimizer, lambda leaf, mask: mask, state, masks,
                                   transform_non_params=lambda leaf: None)
    assert_same_bits(marked[0].mu, masks)
    assert marked[0].count is None
    twice = masked(masked(optax.sgd(0.1), masks), masks)
    updates, _ = twice.update(params, twice.init(params), params)
    once = masked(optax.sgd(0.1), masks)
    assert_same_bits(updates, once.update(params, once.init(params), params)[0])


def test_masked_hands_extra_arguments_on():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    optimizer = masked(inner, {"kernel": jnp.array([True])})
    optimizer.update({"kernel": jnp.array([1.0])}, optimizer.init({"kernel": jnp.array([1.0])}), value=7)
    assert seen == [7]


def test_masks_of_another_network_are_refused_in_any_containers():
    _, params, masks = linen()
    with pytest.raises(ValueError, match="leaf 'layers_2/bias' is missing"):
        masked(optax.sgd(0.1), {"layers_0": masks["layers_0"]}).init(params)
    with pytest.raises(TypeError, match="'layers_0/bias' has dtype float32"):
        masked(optax.sgd(0.1), params).init(params)
    model = fresh_model()
    _, _, masks = pruned_model()

    def optimize(masks, wrt=nnx.Param):
        return nnx.Optimizer(model, masked(optax.sgd(0.1), masks), wrt=wrt)

    with pytest.raises(ValueError, match="leaf 'layers/0/bias' is missing"):
        optimize({"layers": {2: masks["layers"][2]}})
    with pytest.raises(ValueError, match=r"leaf 'layers/0/kernel' has shape \(6, 4\)"):
        optimize(jax.tree.map(lambda m: m.T, masks))
    with pytest.raises(ValueError, match="extra leaf 'layers/0/bias'"):
        optimize(masks, wrt=nnx.All(nnx.Param, nnx.PathContains("kernel")))


PREFIXES = {
    "one boolean a layer": ({"layers_0": False, "layers_2": True}, {"layers_0": False, "layers_2": True}),
    "one boolean a leaf": ({"layers_0": {"kernel": np.False_, "bias": True}, "layers_2": jnp.array(True)},
                           {"layers_0": {"kernel": False, "bias": True}, "layers_2": True}),
    "nothing for a layer": ({"layers_0": None, "layers_2": False}, {"layers_0": True, "layers_2": False}),
    "nothing at all": (None, True),
    "one boolean": (False, False),
    "a function": (lambda params: jax.tree.map(lambda p: p > 0, params), None),
    "a function to a prefix": (lambda params: {"layers_0": len(params) == 2, "layers_2": False},
                               {"layers_0": True, "layers_2": False}),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_and_functions_mask_as_the_whole_tree_does(name):
    """The oracle is optax's own expansion of a prefix: ``jax.tree.map`` over it."""
    given, prefix = PREFIXES[name]
    _, params, _ = linen()
    masks = given(params) if prefix is None else jax.tree.map(
        lambda keep, part: jax.tree.map(lambda p: jnp.full(p.shape, keep), part), prefix, params)
    gradients = jax.tree.map(lambda p: p + 1, params)
    (updates, state), (want, wanted) = (
        optimizer.update(gradients, optimizer.init(params), params)
        for optimizer in (masked(optax.adamw(0.1), m) for m in (given, masks)))
    assert_same_bits(updates, want)
    assert_same_bits(state, wanted)


def test_prefixes_fit_the_containers_of_an_nnx_model():
    model = fresh_model()
    optimizer = nnx.Optimizer(model, masked(optax.sgd(0.1), {"layers": {0: False, 1: None, 2: True}}), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, nnx.grad(lambda model: mse(model(X)))(model))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert not any(np.asarray(leaf).any() for leaf in after["layers"][0].values())
    assert (after["layers"][2]["bias"] != before["layers"][2]["bias"]).all()


def test_prefixes_that_fit_no_parameters_are_named():
    _, params, _ = linen()
    with pytest.raises(ValueError, match="extra leaf 'layers_1'"):
        masked(optax.sgd(0.1), {"layers_0": True, "layers_1": True, "layers_2": True}).init(params)
    with pytest.raises(ValueError, match="leaf 'layers_2/bias' is missing"):
        masked(optax.sgd(0.1), {"layers_0": True}).init(params)
    with pytest.raises(ValueError, match=r"leaf 'layers_0/bias' has shape \(2,\)"):
        masked(optax.sgd(0.1), {"layers_0": jnp.ones(2, bool), "layers_2": True}).init(params)
    with pytest.raises(TypeError, match=r"dtype int.*, but masks are booleans"):
        masked(optax.sgd(0.1), 1).init(params)
