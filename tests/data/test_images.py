"""Images are an array of which only what is read is computed."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.data.dataset import Dataset

RNG = np.random.default_rng(0)
MEAN, STD = np.array([0.4, 0.5, 0.3], np.float32), np.array([0.2, 0.3, 1], np.float32)
SMALL = Dataset(RNG.integers(0, 256, (6, 4, 5, 3), np.uint8), np.arange(6), MEAN, STD, 10, "cifar10", 255)
WHOLE = (SMALL.pixels.astype(np.float32) / np.float32(255) - MEAN) / STD

INDICES = [0, -1, slice(1), slice(None, None, -2), [4, 0, 0], np.array([[1], [2]]), np.arange(6) % 2 == 0, ..., None,
           (0, 1, 2, 0), (slice(2), 1), (..., 2), (..., [2, 0]), (slice(None), None, 1), ([0, 1], slice(None), [2, 3]),
           (slice(0), 0), SMALL.pixels > 100, np.int64(3), jnp.array([1, 2])]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: str(index).replace("\n", "")[:40])
def test_what_is_chosen_is_that_part_of_the_whole_to_the_last_bit(index):
    part = SMALL.images[index]
    np.testing.assert_array_equal(part, WHOLE[index])
    assert part.dtype == np.float32
    assert type(part) is type(WHOLE[index])


def test_indices_out_of_range_are_errors_as_of_any_array():
    for index in (6, -7, (0, 0, 0, 3), "x", 0.5):
        with pytest.raises(IndexError):
            SMALL.images[index]
    with pytest.raises(TypeError):
        SMALL.images[0] = 1


USES = {
    "jnp.asarray": jnp.asarray, "np.asarray": np.asarray, "device_put": jax.device_put, "abs": abs, "list": list,
    "float64": lambda x: np.asarray(x, np.float64), "float16": lambda x: x.astype(np.float16),
    "jit": jax.jit(lambda x: x + 1), "vmap": jax.vmap(lambda x: x.sum()), "grad": jax.grad(lambda x: (x**2).sum()),
    "scan": lambda x: jax.lax.scan(lambda c, v: (c, v.sum()), 0, x)[1],
    "closure": lambda x: jax.jit(lambda w: x @ w)(jnp.ones(3)), "tree": lambda x: jax.tree.map(lambda v: v[:2], x),
    "jnp.mean": lambda x: jnp.mean(x, axis=0), "np.mean": lambda x: np.mean(x, axis=(0, 1, 2)),
    "std": lambda x: x.std((0, 1)), "reshape": lambda x: x.reshape(len(x), -1) @ np.ones(60), "T": lambda x: x.T,
    "jax @": lambda x: jnp.ones((3, 5)) @ x, "@ jax": lambda x: x @ jnp.ones((3, 2)),
    "+": lambda x: x + x, "-": lambda x: 1 - x, "neg": lambda x: -x, "*": lambda x: np.ones(3) * x * 2,
    "/": lambda x: 1 / x, "**": lambda x: x**2, "> jax": lambda x: x > jnp.zeros(3), "==": lambda x: x == np.array(x),
    "in": lambda x: (np.array(x)[1, 2, 3, 0] in x, 1e9 in x),
    "concatenate": lambda x: np.concatenate([x, x]), "stack": lambda x: jnp.stack([x, x]),
    "where": lambda x: jnp.where(x > 0, x, 0), "shape": lambda x: (x.shape, x.ndim, x.size, len(x)),
    "jnp.shape": lambda x: (jnp.shape(x), jnp.result_type(x) == np.float32)}


@pytest.mark.parametrize("use", USES)
def test_images_are_used_like_the_whole_array(use):
    with jax.numpy_dtype_promotion("standard"):
        got, want = (USES[use](x) for x in (SMALL.images, WHOLE))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_networks_take_images_as_they_are():
    module = pk.models.fc(3, 1)
    with jax.numpy_dtype_promotion("standard"):
        params = module.init(jax.random.key(0), SMALL.images)["params"]
        np.testing.assert_array_equal(*(module.apply({"params": params}, x) for x in (SMALL.images, WHOLE)))
        apply_fn, params = pk.from_linen(module, {"params": params})
        calls = {
            "apply": lambda x: apply_fn(params, x), "ntk": lambda x: pk.ntk(apply_fn, params, x, x[:2]),
            "plan": lambda x: pk.ntk_plan(apply_fn, params, x).bytes,
            "data_factor": lambda x: pk.data_factor(apply_fn, params, x),
            "trace": lambda x: pk.path_kernel.gated_trace(apply_fn, params, x),
            "mean": lambda x: pk.mean_input(x, absolute=True)}
        for call in calls.values():
            np.testing.assert_array_equal(call(SMALL.images), call(WHOLE))


def test_errors_about_images_speak_of_one_array():
    with pytest.raises(ValueError, match="the mean of X is negative"):
        pk.mean_input(SMALL.images)


def test_reading_one_example_costs_one_example_and_the_whole_costs_itself():
    large = Dataset(np.ones((3000, 32, 32, 3), np.uint8), np.zeros(3000, int), MEAN, STD, 10, "cifar10", 255)
    example = 4 * 32 * 32 * 3
    tracemalloc.start()
    try:
        for read in (lambda: large.images[:1], lambda: large.images[7], lambda: large.images[[3, 4]],
                     lambda: large.raw[:1], lambda: next(iter(large.images)),
                     lambda: (large.images.shape, large.images.dtype, len(large.images))):
            tracemalloc.reset_peak()
            read()
            assert tracemalloc.get_traced_memory()[1] < 8 * example
        assert np.asarray(large.images).nbytes == 3000 * example
        assert 3000 * example < tracemalloc.get_traced_memory()[1] < 1.05 * 3000 * example
        assert tracemalloc.get_traced_memory()[0] < example         # nothing is kept
    finally:
        tracemalloc.stop()
