"""Iterative magnitude pruning is the loop that its authors write: train, sort by size, go back, again."""

import flax.linen as nn
import jax
import numpy as np
import pkjax as pk
import pytest
from flax import nnx
from pkjax.training import Recipe, fit, iterative_magnitude_pruning

RECIPE = Recipe(learning_rate=0.02, epochs=4, batch_size=32, drops=(2,))
REST = Recipe(learning_rate=0.02, epochs=3, batch_size=32, drops=(1,))      # after the first epoch


class Norm(nn.Module):
    """A network with averages."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(9)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def digits():
    return pk.data.load("digits", samples=96), pk.data.load("digits", split="test", samples=40)


def largest(params, masks, count):
    """Masks of the largest kernel weights among those kept, by NumPy's stable sort; ties go to the first."""
    kernels = [("Dense_0", "kernel"), ("Dense_1", "kernel")]
    flat = np.concatenate([np.where(masks[a][b], np.abs(params[a][b]), -1.0).ravel() for a, b in kernels])
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:count]] = True
    out = {a: {b: np.ones(np.shape(v), bool) for b, v in layer.items()} for a, layer in params.items()}
    start = 0
    for a, b in kernels:
        shape = np.shape(params[a][b])
        out[a][b] = kept[start:start + np.prod(shape)].reshape(shape)
        start += int(np.prod(shape))
    return out


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


@pytest.fixture(scope="module")
def start(digits):
    return Norm().init(jax.random.key(1), digits[0].images[:1])


@pytest.mark.parametrize("rewind", [0, 1, None])
def test_rounds_are_the_loop_by_hand(digits, start, rewind):
    found = iterative_magnitude_pruning(Norm(), *digits, recipe=RECIPE, density=0.25, rounds=2, rewind=rewind,
                                        variables=start, seed=3)
    size = 64 * 9 + 9 * 10
    begin, rest = start, RECIPE
    if rewind == 1:
        first = fit(Norm(), *digits, recipe=RECIPE, variables=start, seed=3, epochs=1)
        begin, rest = {"params": first.params, **first.state}, REST
    masks = {a: {b: np.ones(np.shape(v), bool) for b, v in layer.items()} for a, layer in start["params"].items()}
    for number in (1, 2):
        trained = fit(Norm(), *digits, recipe=rest, variables=begin, masks=masks, seed=3)
        masks = largest(jax.tree.map(np.asarray, trained.params), masks, round(size * 0.25 ** (number / 2)))
        if rewind is None:
            begin = {"params": trained.params, **trained.state}
        assert same(found.rounds[number - 1].pruning.masks, masks)
        assert found.rounds[number - 1].accuracy == trained.accuracy
        assert len(found.rounds[number - 1].history) == rest.epochs + 1
    assert same(found.masks, masks)
    assert same(found.params, jax.tree.map(lambda v, m: np.where(m, v, 0), begin["params"], masks))
    assert same(found.state, {"batch_stats": begin["batch_stats"]})
    assert found.recipe == rest
    assert [r.pruning.kept for r in found.rounds] == [round(size / 2), round(size / 4)]
    assert jax.tree.leaves(found.masks["Dense_0"]["bias"])[0].all()


def test_a_ticket_trains_with_its_masks(digits, start):
    ticket = iterative_magnitude_pruning(Norm(), *digits, recipe=RECIPE, compression=1, variables=start, rewind=1)
    done = fit(ticket.module, *digits, variables=ticket.variables, masks=ticket.masks, recipe=ticket.recipe)
    assert sum(int((np.asarray(done.params[n]["kernel"]) != 0).sum()) for n in ("Dense_0", "Dense_1")) == 67
    assert ticket.rounds[0].pruning.kept == 67 == round(666 / 10)
    assert "rounds=<1 of Round>" in repr(ticket)


def test_nnx_modules_are_rewound_too(digits):
    module = pk.models.nnx_fc(64, width=6, depth=1, rngs=nnx.Rngs(0))
    first = pk.from_nnx(module)[1]
    ticket = iterative_magnitude_pruning(module, *digits, recipe=RECIPE, density=0.3, rounds=2)
    assert same(pk.from_nnx(module)[1], first)
    assert same(pk.from_nnx(ticket.module)[1], pk.apply_masks(first, ticket.masks))
    assert same(ticket.params, pk.apply_masks(first, ticket.masks))
    assert ticket.variables is None
    assert fit(ticket.module, *digits, masks=ticket.masks, recipe=ticket.recipe).finished


def test_an_interrupted_call_resumes_with_the_same_result(digits, start, tmp_path, monkeypatch):
    from pkjax.training import iterative_pruning
    options = {"recipe": RECIPE, "density": 0.25, "rounds": 2, "rewind": 1, "variables": start}
    whole = iterative_magnitude_pruning(Norm(), *digits, **options)
    own, calls = iterative_pruning.prune, []

    def failing(*args, **more):
        calls.append(1)
        if len(calls) == 3:      # the first is before all trainings
            raise KeyboardInterrupt
        return own(*args, **more)

    monkeypatch.setattr(iterative_pruning, "prune", failing)
    with pytest.raises(KeyboardInterrupt):
        iterative_magnitude_pruning(Norm(), *digits, **options, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before-rewinding", "round-1-of-2", "round-2-of-2"]
    lines = []
    again = iterative_magnitude_pruning(Norm(), *digits, **options, checkpoint=tmp_path, progress=lines.append)
    assert not lines                                     # every training had ended
    assert same(again.masks, whole.masks)
    assert same(again.params, whole.params)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"rounds": 0, "density": 0.5}, ValueError, "rounds must be at least 1, but got 0"),
    ({"rewind": 4, "density": 0.5}, ValueError, "rewind must be an epoch before the last, at most 3, or None, got 4"),
    ({"rewind": -1, "density": 0.5}, ValueError, "rewind must be at least 0, but got -1"),
    ({}, ValueError, "give exactly one of compression"),
    ({"density": 0.001, "min_per_layer": 1}, ValueError, "min_per_layer=1 keeps at least"),
    ({"density": 0.5, "schedule": lambda step, steps, density: 2.0}, ValueError, r"density must lie in \(0, 1\]")])
def test_bad_input_is_named(digits, options, error, message):
    lines = []
    with pytest.raises(error, match=message):
        iterative_magnitude_pruning(pk.models.fc(4, 1), *digits, recipe=RECIPE, progress=lines.append, **options)
    assert not lines                                     # nothing was trained


def test_what_remains_of_a_recipe_has_its_learning_rates():
    whole = Recipe(learning_rate=1.0, epochs=9, drops=(2, 6))
    for k in range(9):
        rest = whole.after(k)
        assert rest.epochs == 9 - k
        np.testing.assert_allclose([rest.rate(e) for e in range(1, 10 - k)], [whole.rate(e) for e in range(k + 1, 10)])
