"""The analyzer reads its network afresh, and compiles once for equal ones."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.analysis.analyze import analyze

from tests.cases import checking_leaks, compilations, normal

WEIGHTS = {"a": normal(0, (3, 2)), "b": normal(1, (2, 2))}
X = normal(2, (3, 3))
ONES = jnp.ones((1, 3))
NUMBERS = ("lam", "nu", "pi", "trace_ntk", "trace_pi", "gated_trace", "effective_rank", "log10_paths",
           "log10_effective_paths", "carried", "captured")


def net(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def scaled_by(constant):
    return lambda p, x: net(p, x) * constant


def same(report, other):
    for name in NUMBERS:
        size = np.abs(getattr(other, name)).max()
        np.testing.assert_allclose(getattr(report, name), getattr(other, name), rtol=0, atol=1e-8 * size, err_msg=name)
    assert all(check.passed for check in report.checks.values()), report.checks


def test_what_the_network_closes_over_may_change_between_calls():
    state = {"array": jnp.ones(2)}

    def changing(p, x):
        return net(p, x) * state["array"]
    before = analyze(changing, WEIGHTS, X)
    state["array"] = jnp.array([10.0, 0.1])
    after = analyze(changing, WEIGHTS, X)
    assert after.trace_ntk > 2 * before.trace_ntk
    same(after, analyze(scaled_by(jnp.array([10.0, 0.1])), WEIGHTS, X))


def test_an_identical_call_and_one_with_other_weights_masks_constants_and_data_compile_nothing():
    for seed in (0, 1):
        constant, weights = jnp.full(2, 1.0 + seed), jax.tree.map(lambda v, seed=seed: v + seed, WEIGHTS)
        masks = {"a": jnp.ones((3, 2), bool).at[0, :seed + 1].set(False), "b": jnp.eye(2) == 1}
        data = X + seed
        with compilations() as count:
            analyze(scaled_by(constant), weights, data, masks=masks, k=3)
    assert count() == 0


def test_nothing_is_pinned_after_the_call():
    constant, weights, data = jnp.full(2, 3.0), {n: v + 1.0 for n, v in WEIGHTS.items()}, X + 1
    kept = [weakref.ref(v) for v in (constant, *weights.values(), data)]
    report = analyze(scaled_by(constant), weights, data)
    del constant, weights, data
    gc.collect()
    assert [r() for r in kept] == [None] * 4, report


def test_no_tracer_leaks():
    with checking_leaks():
        analyze(scaled_by(jnp.ones(2)), WEIGHTS, X)


def test_tokens_are_one_hot_vectors_and_bytes_are_numbers():
    tokens = jnp.array([1, 0, 2])
    same(analyze(lambda p, t: jax.nn.relu(p["a"][t]) @ p["b"], WEIGHTS, tokens, x=tokens[:1]),
         analyze(net, WEIGHTS, jax.nn.one_hot(tokens, 3, dtype=float), x=jax.nn.one_hot(tokens[:1], 3, dtype=float)))
    pixels = jnp.array([[255, 51, 0], [1, 2, 3]], jnp.uint8)
    same(analyze(lambda p, x: net(p, x.astype(p["a"].dtype) / 255), WEIGHTS, pixels, x=pixels[:1]),
         analyze(lambda p, x: net(p, x / 255), WEIGHTS, pixels.astype(float), x=pixels[:1].astype(float)))
    with pytest.raises(ValueError, match=r"x must be given where X holds integers \(tokens, bytes\)"):
        analyze(lambda p, t: p["a"][t], WEIGHTS, tokens)


@pytest.mark.parametrize(("fn", "X"), [
    (lambda p, x: net(p, x).reshape(-1, 1, 2, 1), X),
    (lambda p, x: {"logits": net(p, x)}, X),
    (lambda p, x: net(p, jnp.concatenate([x["left"], x["right"][:, :, 0]], 1)),
     {"left": X[:, :1], "right": X[:, 1:, None]}),
], ids=["output (N, H, W, C)", "tree of one output", "tree of inputs"])
def test_other_forms_of_a_network_give_the_same_report(fn, X):
    report = analyze(fn, WEIGHTS, X)
    same(report, analyze(net, WEIGHTS, globals()["X"]))
    assert (report.samples, report.outputs, report.parameters) == (3, 2, 10)


def test_outputs_of_one_number_an_example_are_taken():
    same(analyze(lambda p, x: net(p, x)[:, 0], WEIGHTS, X), analyze(lambda p, x: net(p, x)[:, :1], WEIGHTS, X))


def test_narrow_numbers_are_computed_with_in_float32():
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (WEIGHTS, X))
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), narrow)
    report, other = analyze(net, *narrow), analyze(net, *wide)
    for name in NUMBERS:
        np.testing.assert_array_equal(getattr(report, name), getattr(other, name))


def test_networks_that_join_examples_are_refused():
    with pytest.raises(ValueError, match="each row of the output must depend on its own example alone"):
        analyze(lambda p, x: net(p, x - x.mean(0)), WEIGHTS, X)
