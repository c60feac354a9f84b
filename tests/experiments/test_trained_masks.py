"""Pruners that train are runs like any others: their masks and weights are those of iterative magnitude pruning."""

import jax
import numpy as np
import pkjax as pk
import pytest
from pkjax.cli.main import main
from pkjax.experiments.settings import Settings, grid
from pkjax.training import iterative_magnitude_pruning

SMALL = {"model": "fc-6x1", "train_samples": 64, "test_samples": 40, "traces": 2, "output_samples": 2, "batch_size": 32,
         "learning_rate": 0.01}


def by_hand(chosen, rounds, rewind):
    train, test = (pk.data.load("digits", split=split, samples=n, seed=chosen.seed)
                   for split, n in (("train", 64), ("test", 40)))
    module = pk.models.fc(6, 1)
    variables = jax.jit(module.init)(jax.random.key(chosen.seed), train.images[:1])
    ticket = iterative_magnitude_pruning(module, train, test, recipe=chosen.recipe, compression=chosen.compression,
                                         rounds=rounds, rewind=rewind, variables=variables, seed=chosen.seed)
    result = pk.training.fit(module, train, test, recipe=chosen.recipe, variables=ticket.variables, masks=ticket.masks,
                             seed=chosen.seed)
    return ticket, result


@pytest.mark.parametrize(("pruner", "steps", "epochs", "rounds", "rewind"), [
    ("magnitude-after-training", None, 2, 1, None), ("imp", 2, 2, 2, 0), ("imp", 2, 20, 2, 1)])
def test_a_run_is_the_pruning_by_hand_and_a_training_from_there(pruner, steps, epochs, rounds, rewind):
    chosen = Settings(**SMALL, pruner=pruner, compression=0.5, prune_steps=steps, epochs=epochs, seed=3)
    record, masks = pk.experiments.run(chosen)
    ticket, result = by_hand(chosen, rounds, rewind)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, masks, ticket.masks)))
    np.testing.assert_allclose([row["test_accuracy"] for row in record["history"]],
                               [row["test_accuracy"] for row in result.history], atol=1e-6)
    assert record["pruning"]["history"] == [each.pruning.kept for each in ticket.rounds]
    assert record["pruning"]["accuracy_before"] == [each.accuracy for each in ticket.rounds]
    assert record["history"][0]["epoch"] == 0
    assert record["settings"]["prune_steps"] == rounds


def test_runs_that_search_train_together_with_others(tmp_path):
    runs = grid({**SMALL, "epochs": 1, "compression": 0.5, "prune_steps": 2,
                 "pruner": ["imp", "magnitude", "phew"]})
    outcome = pk.experiments.sweep(runs, tmp_path, together=3)
    assert outcome.failed == 0
    table = pk.experiments.table(tmp_path)
    assert sorted(table["pruner"]) == sorted(run.pruner for run in runs)
    kept = {round((64 + 10) * 6 * 10**-0.5)}
    assert {round(d * (64 + 10) * 6) for d in table["density"]} == kept


def test_what_cannot_be_is_refused_before_anything_trains(capsys):
    assert main(["prune", "--model", "fc-6x1", "--pruner", "imp"]) == 2
    assert "the pruner imp finds its masks by training: use pkjax train or pkjax sweep" in (
        " ".join(capsys.readouterr().err.split()))
    with pytest.raises(ValueError, match="a compression of 4 keeps none of the 444 weights"):
        pk.experiments.run(Settings(**SMALL, pruner="imp", compression=4, epochs=1))
    with pytest.raises(ValueError, match=r"unknown pruner 'lottery'; choose from none, random, .*, imp"):
        Settings(pruner="lottery")
