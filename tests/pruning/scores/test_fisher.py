"""The Fisher diagonal is what PyTorch computes example by example, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import FLOAT, assert_close
from tests.pruning.scores.test_iterative_snip import BATCHES, LABELS, PARAMS, X, loss


def per_example():
    torch = pytest.importorskip("torch")
    total = {name: np.zeros(v.shape) for name, v in PARAMS.items()}
    for x, label in zip(np.asarray(X), LABELS, strict=True):
        held = {name: torch.tensor(np.asarray(v), requires_grad=True) for name, v in PARAMS.items()}
        out = torch.relu(torch.relu(torch.tensor(x) @ held["a"]) @ held["b"] + held["bias"]) @ held["c"]
        torch.nn.functional.cross_entropy(out, torch.tensor(label)).backward()
        for name, leaf in held.items():
            total[name] += (leaf.grad**2).numpy()
    return {name: np.asarray(PARAMS[name]) ** 2 * total[name] for name in total}


def test_fisher_is_pytorchs_sum_over_examples_for_any_batches():
    want = per_example()
    for batches, size in (([(X, LABELS)], 16), (BATCHES, 16), (BATCHES, 2), ([(X, LABELS)], 5), ([(X, LABELS)], 1)):
        found = pk.fisher(loss, PARAMS, batches, batch_size=size)
        for name in PARAMS:
            assert_close(found[name], want[name])
    mean_only = pk.snip(loss, PARAMS, BATCHES)
    assert not np.allclose(found["b"], mean_only["b"] ** 2)


def test_fisher_prunes_in_steps_under_jit_and_vmap():
    batches = [(X, LABELS)]
    found = pk.prune(lambda p: pk.fisher(loss, p, batches), PARAMS, density=0.3, steps=3)
    again = pk.prune(lambda p: pk.fisher(loss, p, iter(batches)), PARAMS, density=0.3, steps=3, jit=True)
    assert found.kept == round(0.3 * found.total)
    assert all(np.array_equal(found.masks[n], again.masks[n]) for n in PARAMS)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), PARAMS)
    both = jax.vmap(lambda p: pk.fisher(loss, p, batches))(two)
    for name in PARAMS:
        assert_close(both[name][0], per_example()[name])


def test_only_chunks_of_gradients_are_held():
    p = {"kernel": jnp.ones((40, 50), FLOAT)}
    x = jnp.ones((64, 40), FLOAT)

    def peak(size):
        fn = jax.jit(lambda p, x: pk.fisher(lambda p, x: ((x @ p["kernel"]) ** 2).mean(), p, [x], batch_size=size))
        return fn.lower(p, x).compile().memory_analysis().temp_size_in_bytes

    assert peak(2) < peak(64) / 4


@pytest.mark.parametrize(("batches", "options", "error", "message"), [
    ([], {}, ValueError, "batches holds no batch"),
    ({"x": X}, {}, TypeError, "batches must be an iterable of batches, got a dict; pass \\[batch\\] for one"),
    (BATCHES, {"batch_size": 0}, ValueError, "batch_size must be a whole number of examples, 1 or more, got 0"),
    ([(X * np.nan, LABELS)], {}, ValueError, "batches, batch 0, leaf '0' holds 72 values that are NaN"),
    ([(X, LABELS[:3])], {}, ValueError, "must share a leading axis")])
def test_bad_input_is_named(batches, options, error, message):
    with pytest.raises(error, match=message):
        pk.fisher(loss, PARAMS, batches, **options)


def test_scores_that_overflow_are_refused():
    with pytest.raises(FloatingPointError, match="fisher gives scores that are not finite at leaf 'kernel'"):
        pk.fisher(lambda p, x: (x @ p["kernel"]).mean(), {"kernel": jnp.full((1, 1), 1e30, jnp.float32)},
                  [jnp.ones((2, 1), jnp.float32)])
