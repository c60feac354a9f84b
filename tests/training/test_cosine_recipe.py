"""AdamW with a warm-up and a cosine, against optax's own loop and PyTorch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from flax import nnx
from pkjax.training import CosineRecipe, Recipe, recipe

from tests.cases import approx, assert_close, normal

HOW = CosineRecipe(learning_rate=0.1, epochs=6, batch_size=32, weight_decay=0.3, warm_up=1 / 3)


@pytest.mark.parametrize("model", ["vit_tiny", "mlp_mixer", "convnext_tiny"])
def test_transformers_on_cifar_train_as_lee_lee_and_song_do(model):
    given = recipe(model, "cifar10")
    assert isinstance(given, CosineRecipe)
    assert (given.learning_rate, given.epochs, given.batch_size, given.weight_decay) == (1e-3, 100, 128, 0.05)
    assert given.warm_up * given.epochs == approx(10)
    assert given.augment
    assert not recipe(model, "digits").augment


def test_learning_rate_rises_to_its_peak_and_falls_to_0_as_a_cosine():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 200, 600)
    assert_close([HOW.rate(e) for e in range(1, 7)], [schedule(100 * e - 50) for e in range(1, 7)], 1e-6)
    assert CosineRecipe(warm_up=0.0, epochs=2, learning_rate=1.0).rate(1) == approx((1 + np.cos(np.pi / 4)) / 2)


def updates(how, params, slopes, steps):
    """Parameters after each step."""
    optimizer, out = how.optimizer(steps), []
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for slope in slopes:
            change, state = optimizer.update(slope, state, params)
            params = optax.apply_updates(params, change)
            out.append(params)
    return out


def test_updates_are_those_of_pytorchs_adamw():
    torch = pytest.importorskip("torch")
    params = {"kernel": normal(0, (2, 3)), "bias": normal(1, (3,))}
    slopes = [{"kernel": normal(2 * i, (2, 3)), "bias": normal(2 * i + 1, (3,))} for i in range(1, 7)]
    held = {name: torch.nn.Parameter(torch.tensor(np.array(leaf))) for name, leaf in params.items()}
    other = torch.optim.AdamW([{"params": [held["kernel"]], "weight_decay": 0.3},
                               {"params": [held["bias"]], "weight_decay": 0.0}])
    rates = [0.0, 0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * t / 4)) for t in (1, 2, 3))]
    for got, rate, slope in zip(updates(HOW, params, slopes, steps=1), rates, slopes, strict=True):
        for group in other.param_groups:
            group["lr"] = rate
        for name, parameter in held.items():
            parameter.grad = torch.tensor(np.array(slope[name]))
        other.step()
        for name, parameter in held.items():
            assert_close(got[name], parameter.detach().numpy(), 1e-6)


def test_the_rest_of_a_recipe_has_its_rates_in_every_step():
    rest = HOW.after(2).after(1)
    assert rest.epochs == 3
    assert_close([rest.rate(e) for e in (1, 2, 3)], [HOW.rate(e) for e in (4, 5, 6)], 1e-12)
    params, slope = {"kernel": jnp.zeros((1, 1))}, {"kernel": jnp.ones((1, 1))}
    whole, part = (np.diff([np.zeros(1), *(p["kernel"][0] for p in updates(how, params, [slope] * n, steps=2))], axis=0)
                   for how, n in ((CosineRecipe(0.1, 6, weight_decay=0.0), 12),
                                  (CosineRecipe(0.1, 6, weight_decay=0.0).after(3), 6)))
    assert_close(part, whole[6:], 1e-5)      # of equal slopes, Adam makes steps of the learning rate
    assert np.abs(np.diff(part, axis=0)).min() > 1e-4


def test_without_a_warm_up_the_first_step_is_the_largest():
    (first, second) = updates(CosineRecipe(0.1, 2, weight_decay=0.0, warm_up=0.0), {"bias": jnp.zeros(1)},
                              [{"bias": jnp.ones(1)}] * 2, steps=1)
    assert_close([first["bias"][0], second["bias"][0]], [-0.1, -0.1 - 0.05], 1e-5)


@pytest.mark.parametrize(("given", "message"), [
    ({"warm_up": 1.0}, r"warm_up must be at least 0 and below 1, got 1\.0"),
    ({"warm_up": float("nan")}, "warm_up must be"), ({"completed": -1}, "completed must be at least 0, got -1"),
    ({"drops": (3,)}, r"falls without drops, got \(3,\)"), ({"epochs": 0}, "epochs must be at least 1")])
def test_recipes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CosineRecipe(**given)


def test_a_vision_transformer_trains_by_it_under_masks(tmp_path):
    digits = pk.data.load("digits", samples=128)
    how = CosineRecipe(learning_rate=0.003, epochs=2, batch_size=32, weight_decay=0.05)
    with jax.numpy_dtype_promotion("standard"):
        model = pk.models.vit_tiny(10, image=8, channels=1, patch=4, depth=1, width=12, heads=2, rngs=nnx.Rngs(0))
        masks = pk.prune(pk.magnitude, pk.from_nnx(model)[1], compression=0.3, progress=False).masks
        done = pk.training.fit(model, digits, digits, recipe=how, masks=masks, checkpoint=tmp_path)
    assert done.history[-1]["test_loss"] < done.history[0]["test_loss"]
    assert [row["learning_rate"] for row in done.history[1:]] == [how.rate(1), how.rate(2)]
    for leaf, mask in zip(jax.tree.leaves(done.params), jax.tree.leaves(masks), strict=True):
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
    with pytest.raises(ValueError, match="CosineRecipe"):
        pk.training.fit(model, digits, digits, recipe=Recipe(0.003, 2, 32), masks=masks, checkpoint=tmp_path)
