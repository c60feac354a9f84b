"""Prunable and trainable leaves are one kind of choice: a predicate, a tree of booleans, or None."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.trees import is_boolean_tree, select, trainable_leaves


@partial(jax.tree_util.register_dataclass, data_fields=["bias", "kernel"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters and network in one, as an Equinox module or a Flax struct is."""

    kernel: object
    bias: object

    def __call__(self, x):
        raise AssertionError("taken for a predicate")


@dataclasses.dataclass(frozen=True)
class Named:
    """A predicate that is an object."""

    name: str

    def __call__(self, path, leaf):
        return path[-1].name == self.name


PARAMS = Layer(kernel=jnp.arange(1.0, 7.0).reshape(2, 3), bias=jnp.zeros(3))
CHOICES = {
    "predicate": lambda path, leaf: path[-1].name == "kernel",
    "callable object": Named("kernel"),
    "tree": Layer(kernel=True, bias=False),
    "tree of NumPy's": Layer(kernel=np.True_, bias=np.array(False)),
    "kernels": pk.kernels,
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_way_to_choose_leaves_chooses_the_same(name):
    choice = CHOICES[name]
    assert jax.tree.leaves(select(choice, PARAMS)) == [False, True]
    result = pk.prune(pk.magnitude, PARAMS, density=0.5, prunable=choice)
    assert (result.kept, result.total) == (3, 6)
    assert result.masks.bias.all()
    assert [layer.name for layer in pk.connectivity(lambda p, x: x @ p.kernel, PARAMS, jnp.ones((1, 2)),
                                                    prunable=choice).layers] == ["kernel"]
    scores = pk.grasp(lambda p: (p.kernel**2).sum() + (p.bias + 1).sum() ** 2, PARAMS, prunable=choice)
    assert scores.kernel.all()
    assert not scores.bias.any()
    drawn = pk.reinitialize(PARAMS, key=jax.random.key(0), prunable=choice, initializer=jax.nn.initializers.ones)
    assert (drawn.bias == 0).all()
    assert (drawn.kernel == 1).all()
    theta = pk.ntk(lambda p, x: x @ p.kernel + p.bias, PARAMS, jnp.ones((1, 2)), trainable=choice)
    assert float(theta[0, 0, 0, 0]) == 2.0


def test_none_chooses_all_floating_point_leaves():
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "steps": jnp.array(3)}
    assert select(None, params) == {"a": True, "b": True, "steps": False}
    assert trainable_leaves(params) == {"a": True, "b": True, "steps": False}
    assert pk.prune(pk.magnitude, params, density=0.5, prunable=None).total == 6


def test_a_callable_is_a_tree_where_its_leaves_are_booleans():
    assert is_boolean_tree(Layer(kernel=True, bias=jnp.array([True, False, True])))
    assert not is_boolean_tree(Layer(kernel=jnp.ones(2), bias=True))
    assert not is_boolean_tree(Layer(kernel=None, bias=None))
    assert not is_boolean_tree(pk.kernels)


def test_a_choice_of_another_kind_is_named():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"prunable must be a function .* but is a dict whose leaves"):
        pk.prune(pk.magnitude, params, density=0.5, prunable={"a": 1, "b": 0})
    with pytest.raises(TypeError, match=r"trainable must be a function .* but is a str"):
        trainable_leaves(params, "a")
    with pytest.raises(ValueError, match="prunable must have the tree structure of params, but differs at leaf 'b'"):
        pk.prune(pk.magnitude, params, density=0.5, prunable={"a": True})
    with pytest.raises(TypeError, match=r"chooses among the entries of the leaf 'b'.*pass masks"):
        pk.prune(pk.magnitude, params, density=0.5, prunable={"a": True, "b": jnp.eye(2) > 0})
    with pytest.raises(ValueError, match="trainable selects no floating-point leaf"):
        trainable_leaves(params, {"a": False, "b": False})


def test_entries_may_train_one_by_one():
    params = {"a": jnp.ones((1, 2))}
    theta = pk.ntk(lambda p, x: x @ p["a"], params, jnp.ones((1, 1)), trainable={"a": jnp.array([[True, False]])})
    assert jnp.diagonal(theta[0, 0]).tolist() == [1.0, 0.0]
