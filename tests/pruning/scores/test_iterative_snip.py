"""SNIP in several steps and FORCE are what PyTorch computes, written from their formulae."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest

from tests.cases import FLOAT, assert_close, normal

X, LABELS = normal(0, (12, 6)), np.arange(12) % 3
PARAMS = {"a": normal(1, (6, 7)), "b": normal(2, (7, 5)), "bias": normal(3, (5,)), "c": normal(4, (5, 3))}
KERNELS = ("a", "b", "c")


def network(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"]) @ p["c"]


def loss(p, batch):
    x, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(network(p, x), labels).mean()


BATCHES = [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]


def torch_scores(masks, returning):
    """|θ ∘ g| with g at θ ∘ m; pruned weights score only where they may come back."""
    torch = pytest.importorskip("torch")
    theta = {name: torch.tensor(np.asarray(v)) for name, v in PARAMS.items()}
    held = {name: (v * torch.tensor(masks[name])).requires_grad_() for name, v in theta.items()}
    hidden = torch.relu(torch.relu(torch.tensor(np.asarray(X)) @ held["a"]) @ held["b"] + held["bias"]) @ held["c"]
    torch.nn.functional.cross_entropy(hidden, torch.tensor(LABELS)).backward()
    return {name: ((theta if returning else held)[name] * held[name].grad).abs().detach().numpy() for name in theta}


def torch_masks(steps, density, returning):
    masks = {name: np.ones(v.shape, bool) for name, v in PARAMS.items()}
    total = sum(masks[name].size for name in KERNELS)
    for step in range(1, steps + 1):
        scores = torch_scores(masks, returning)
        flat = np.concatenate([np.where(masks[n] | returning, scores[n], -1).ravel() for n in KERNELS])
        order = np.argsort(-flat, kind="stable")[:round(total * density ** (step / steps))]
        kept = np.isin(np.arange(total), order)
        for name, part in zip(KERNELS, np.split(kept, np.cumsum([masks[n].size for n in KERNELS])[:-1]), strict=True):
            masks[name] = part.reshape(masks[name].shape)
    return masks


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["one batch", "a stream"])
def test_iterative_snip_is_pytorchs(batches):
    own = loss if batches else functools.partial(loss, batch=(X, LABELS))
    found = pk.prune(lambda p: pk.snip(own, p, batches), PARAMS, density=0.2, steps=5, jit=batches is None)
    want = torch_masks(5, 0.2, returning=False)
    assert all(np.array_equal(found.masks[name], want[name]) for name in PARAMS)
    assert not np.array_equal(np.asarray(found.masks["b"]), torch_masks(1, 0.2, returning=False)["b"])


def test_force_is_pytorchs_and_brings_weights_back():
    masks, seen, steps = None, [], 6
    for step in range(1, steps + 1):
        held = masks
        found = pk.prune(lambda p, held=held: pk.snip(loss, p, BATCHES, masks=held), PARAMS,
                         density=pk.exponential(step, steps, 0.2), jit=False)
        masks = found.masks
        seen.append(np.concatenate([np.asarray(masks[n]).ravel() for n in KERNELS]))
    want = torch_masks(steps, 0.2, returning=True)
    assert all(np.array_equal(masks[name], want[name]) for name in PARAMS)
    assert any((after & ~before).any() for before, after in itertools.pairwise(seen))


def test_pruned_weights_score_by_the_gradient_of_the_pruned_network():
    masks = {name: np.random.default_rng(5).random(v.shape) < 0.5 for name, v in PARAMS.items()}
    want = torch_scores(masks, returning=True)
    for found in (pk.snip(loss, PARAMS, BATCHES, masks=masks),
                  pk.snip(lambda p: loss(p, (X, LABELS)), PARAMS, masks=masks),
                  jax.jit(lambda p, m: pk.snip(loss, p, BATCHES, masks=m))(PARAMS, masks)):
        for name in PARAMS:
            assert_close(found[name], want[name])
    assert (want["b"][~masks["b"]] > 0).any()


@pytest.mark.parametrize(("masks", "error", "message"), [
    ({"a": jnp.ones((6, 7), bool)}, ValueError, "masks must have the tree structure of params, but leaf 'b'"),
    (PARAMS, TypeError, f"masks leaf 'a' has dtype {np.dtype(FLOAT)}, but masks are booleans")])
def test_masks_that_do_not_fit_are_refused(masks, error, message):
    with pytest.raises(error, match=message):
        pk.snip(loss, PARAMS, BATCHES, masks=masks)
