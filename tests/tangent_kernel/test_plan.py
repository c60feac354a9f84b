"""Plans of tangent kernels: what they say holds, and they keep the work within memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import ntk, ntk_plan
from pkjax.network import read
from pkjax.tangent_kernel.kernel import _Block

from tests.cases import half_masks, named_network


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def test_a_plan_needs_shapes_alone_and_names_a_route_for_every_leaf():
    apply_fn, params, x = named_network("convnet")
    plan = ntk_plan(apply_fn, shapes(params), shapes(x))
    assert plan == ntk_plan(apply_fn, params, x)
    assert [leaf.name for leaf in plan.leaves] == [jax.tree_util.keystr(p, simple=True, separator="/")
                                                   for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert {leaf.route for leaf in plan.leaves} <= {"Gram", "Gram over places", "masked Gram",
                                                    "Jacobian of the layer", "Jacobian of the leaf"}
    assert plan.engine == "structured"
    assert plan.tiles == 1
    text = str(plan)
    assert all(leaf.name in text and leaf.route in text for leaf in plan.leaves)


def test_masks_and_what_trains_change_the_routes():
    apply_fn, params, x = named_network("mlp")
    masks = half_masks(params)
    assert "masked Gram" in {leaf.route for leaf in ntk_plan(apply_fn, params, x, masks=masks).leaves}
    names = {leaf.name for leaf in ntk_plan(apply_fn, params, x, trainable=lambda _, leaf: leaf.ndim == 2).leaves}
    assert names == {f"{n}/0" for n in range(len(params))}


def test_a_linear_layer_takes_the_operations_counted_by_hand():
    n, i, j = 20, 30, 4
    plan = ntk_plan(lambda w, x: x @ w, jnp.ones((i, j)), jnp.ones((n, i)))
    contraction = 2 * n * n * (i + j * j * j + j * j)           # h·h', then δ·δ' for all pairs of outputs, then both
    passes = n * (1 + j) * 2 * i * j                            # one forward and K backward passes
    assert plan.leaves[0].operations == contraction
    assert plan.operations == contraction + passes


@pytest.mark.parametrize("engine", ["structured", "jacobian"])
@pytest.mark.parametrize(("name", "examples"), [("mlp", 60), ("convnet", 40)])
def test_peak_memory_is_that_of_the_compiled_program(name, examples, engine):
    apply_fn, params, x = named_network(name)
    x = jnp.concatenate([x] * (examples // len(x) + 1))[:examples]
    plan = ntk_plan(apply_fn, params, x, engine=engine)
    net = read(apply_fn, params, x)
    block = jax.jit(_Block(net.whole, engine)).lower(net.fn, net.params, net.entries, x, None)
    program = block.compile().memory_analysis()
    held = program.temp_size_in_bytes + program.output_size_in_bytes
    assert held / 2 <= plan.peak_memory <= 4 * held


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_memory_limit_chooses_tiles_that_do_not_change_the_kernel(share, capsys):
    apply_fn, params, x = named_network("convnet")
    whole = ntk_plan(apply_fn, params, x)
    limit = int(share * whole.peak_memory)
    plan = ntk_plan(apply_fn, params, x, memory_limit=limit)
    assert plan.peak_memory <= limit
    assert plan.tile < len(x)
    theta = ntk(apply_fn, params, x, memory_limit=limit, progress=True)
    assert f"tile {plan.tiles} of {plan.tiles}\n" in capsys.readouterr().err
    np.testing.assert_allclose(theta, ntk(apply_fn, params, x), rtol=1e-10, atol=1e-12)


def test_a_kernel_that_cannot_fit_says_what_would():
    apply_fn, params, x = named_network("mlp")
    least = ntk_plan(apply_fn, params, x, tile=1).peak_memory
    with pytest.raises(ValueError, match=r"memory_limit=1000 .*at least memory_limit=\d+ is needed.*ntk_matvec"):
        ntk(apply_fn, params, x, memory_limit=1000)
    assert ntk_plan(apply_fn, params, x, memory_limit=least).tile >= 1
    limit = (least + ntk_plan(apply_fn, params, x).peak_memory) // 2
    with pytest.raises(ValueError, match=r"tile=[1-4] would fit"):
        ntk_plan(apply_fn, params, x, tile=len(x), memory_limit=limit)


def test_a_network_without_paths_has_the_same_plan():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 2))
    curved, linear = (ntk_plan(net, w, x) for net in (lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w))
    assert curved.engine == "structured"
    assert curved.leaves == linear.leaves


def test_a_leaf_that_nothing_uses_costs_nothing():
    x, params = jnp.ones((2, 3)), {"used": jnp.ones((3, 2)), "unused": jnp.ones((50, 50))}
    plan = ntk_plan(lambda w, x: x @ w["used"], params, x)
    assert [(leaf.name, leaf.route, leaf.operations > 0) for leaf in plan.leaves] == [
        ("unused", "unused", False), ("used", "Gram", True)]


@pytest.mark.parametrize("value", [0, -5, True])
def test_memory_limits_are_whole_numbers_of_bytes(value):
    apply_fn, params, x = named_network("mlp")
    with pytest.raises(ValueError, match="memory_limit must be a whole number of bytes"):
        ntk(apply_fn, params, x, memory_limit=value)
    with pytest.raises(ValueError, match="memory_limit must be a whole number of bytes"):
        ntk_plan(apply_fn, params, x, memory_limit=value)


def test_devices_are_one_or_more_and_a_mesh_is_a_mesh():
    apply_fn, params, x = named_network("mlp")
    with pytest.raises(ValueError, match="devices must be a whole number of devices, 1 or more, got 0"):
        ntk_plan(apply_fn, params, x, devices=0)
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, or None, got int"):
        ntk(apply_fn, params, x, mesh=2)
