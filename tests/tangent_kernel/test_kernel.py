"""Three engines, one kernel: Θ is the Gram matrix of the Jacobian of the parameters that train."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import paths
from pkjax.tangent_kernel import leaf_costs
from pkjax.tangent_kernel.kernel import ntk
from pkjax.tangent_kernel.products import ntk_matvec, ntk_trace

from tests.cases import NETWORKS, drawn_like, half_masks, jacobian, mlp, named_network, normal

ENGINES = ["structured", "jacobian"]
if importlib.util.find_spec("neural_tangents") is not None:
    ENGINES.append("neural-tangents")
relu = jax.nn.relu


def oracle(apply_fn, params, x1, x2, moving=None):
    """The Gram matrix of the dense Jacobian, entries that do not train crossed out."""
    def rows(x):
        leaves = jax.tree.leaves(jacobian(apply_fn)(params, x))
        flat = np.concatenate([np.asarray(j).reshape(len(x), j.shape[1], -1) for j in leaves], -1)
        if moving is not None:
            flat = flat * np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(moving)])
        return flat

    return np.einsum("nkp,mlp->nmkl", rows(x1), rows(x2))


def zeroed(params, masks):
    return jax.tree.map(lambda p, m: p * m.astype(p.dtype), params, masks)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_engine_gives_the_gram_matrix_of_the_jacobian(name, engine):
    apply_fn, params, x = named_network(name)
    want = oracle(apply_fn, params, x, x)
    np.testing.assert_allclose(ntk(apply_fn, params, x, engine=engine), want, rtol=1e-10, atol=1e-10)
    if engine == "structured":
        np.testing.assert_allclose(ntk(apply_fn, params, x[:2], x[2:]), want[:2, 2:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_weights_are_absent_and_do_not_train(name, engine):
    apply_fn, params, x = named_network(name)
    masks = half_masks(params)
    want = oracle(apply_fn, zeroed(params, masks), x, x, masks)
    assert np.abs(want - oracle(apply_fn, zeroed(params, masks), x, x)).max() > 1e-3
    np.testing.assert_allclose(ntk(apply_fn, params, x, engine=engine, masks=masks), want, rtol=1e-10, atol=1e-10)
    if engine == "structured":
        np.testing.assert_allclose(ntk(apply_fn, params, x[:2], x[2:], masks=masks), want[:2, 2:], rtol=1e-10,
                                   atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_chosen_leaves_and_entries_train(engine):
    apply_fn, params, x = named_network("frozen norm")
    names = {"a": True, "scale": False, "shift": False, "b": True}
    moving = {k: jnp.full(v.shape, names[k]) for k, v in params.items()}
    want = oracle(apply_fn, params, x, x, moving)
    for trainable in (names, moving, lambda path, leaf: path[-1].key in "ab"):
        np.testing.assert_allclose(ntk(apply_fn, params, x, engine=engine, trainable=trainable), want, rtol=1e-10)
    part = half_masks(params)
    np.testing.assert_allclose(ntk(apply_fn, params, x, engine=engine, trainable=part),
                               oracle(apply_fn, params, x, x, part), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif("neural-tangents" not in ENGINES, reason="neural-tangents is not installed")
@pytest.mark.parametrize("implementation", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_structured_agrees_with_neural_tangents_in_float32(name, implementation):
    from pkjax.tangent_kernel import neural_tangents
    apply_fn, params, x = named_network(name, jnp.float32)
    ours = ntk(apply_fn, params, x)
    theirs = jax.jit(lambda p: neural_tangents.ntk_fn(apply_fn, implementation=implementation)(x, None, p))(params)
    assert ours.dtype == theirs.dtype == jnp.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(("engine", "tile"), [(engine, 3) for engine in ENGINES]
                         + [("structured", tile) for tile in (1, 2, 7, 50)])
def test_tiles_do_not_change_the_kernel(engine, tile):
    apply_fn, params, x = named_network("mlp")
    masks = half_masks(params)
    whole = ntk(apply_fn, params, x, engine=engine, masks=masks)
    np.testing.assert_allclose(ntk(apply_fn, params, x, engine=engine, masks=masks, tile=tile), whole, rtol=1e-10,
                               atol=1e-12)
    other = ntk(apply_fn, params, x, x[:4] + 1, engine=engine)
    np.testing.assert_allclose(ntk(apply_fn, params, x, x[:4] + 1, engine=engine, tile=tile), other, rtol=1e-10,
                               atol=1e-12)


def test_without_x2_only_one_triangle_of_tiles_is_computed(capsys):
    apply_fn, params, x = named_network("mlp")
    ntk(apply_fn, params, x, tile=2, progress=True)
    assert capsys.readouterr().err.endswith("tile 10 of 10\n")       # 4 of the 16 on the diagonal, 6 beside it
    ntk(apply_fn, params, x, x, tile=2, progress=True)
    assert capsys.readouterr().err.endswith("tile 16 of 16\n")


def test_progress_is_a_line_for_each_tile_given_to_a_function_or_to_nobody(capsys):
    apply_fn, params, x = named_network("mlp")
    lines = []
    ntk(apply_fn, params, x, tile=4, progress=lines.append)
    assert lines == [f"ntk: tile {n} of 3" for n in (1, 2, 3)]
    ntk(apply_fn, params, x, tile=4, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["mlp", pytest.param("convnet", marks=pytest.mark.slow), "shared"])
def test_small_blocks_do_not_change_the_kernel(name, monkeypatch):
    apply_fn, params, x = named_network(name)
    masks = half_masks(params)

    def fresh(p, z):                                                  # a new key of the compilation cache
        return apply_fn(p, z)

    monkeypatch.setattr(leaf_costs, "ENTRIES", 400)          # "shared": outputs in blocks of 2 and 1
    for m in (None, masks):
        want = ntk(apply_fn, params, x, engine="jacobian", masks=m)
        np.testing.assert_allclose(ntk(fresh, params, x, masks=m), want, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ntk(fresh, params, x, x[:3], masks=m), want[:, :3], rtol=1e-10, atol=1e-12)


def oddly_convolved(p, x):
    """Two axes of unlike strides and dilations, channels first, a window larger than the image, positions, groups."""
    def conv(x, k, layout, **options):
        return jax.lax.conv_general_dilated(x, k, dimension_numbers=layout, **options)

    first = ("NCHW", "OIHW", "NHWC")
    last = ("NHWC", "HWIO", "NHWC")
    x = relu(conv(x, p["first"], first, window_strides=(2, 1), padding=((2, 1), (0, 3)), rhs_dilation=(1, 2)))
    x = relu(conv(x, p["groups"], last, window_strides=(2, 3), padding="SAME", feature_group_count=2))
    x = relu(conv(x, p["large"], last, window_strides=(1, 1), padding="SAME") + 0.1)
    return (x @ p["positions"]).sum((1, 2))


@pytest.mark.parametrize("over_places", [True, False])
def test_convolutions_contract_exactly_by_either_route(over_places, monkeypatch):
    shapes = {"first": (4, 2, 3, 2), "groups": (2, 2, 2, 6), "large": (5, 5, 6, 3), "positions": (3, 3)}
    params = drawn_like(shapes)
    x = normal(1, (5, 2, 5, 6))
    sites, _ = paths.sites(oddly_convolved, params, x[:1])
    assert [site.kind for site in sites] == ["convolution", "other", "convolution", "dense"]
    monkeypatch.setattr(leaf_costs, "over_places", lambda *sizes: over_places)

    def fresh(p, z):                                                  # a new key of the compilation cache
        return oddly_convolved(p, z)

    want = oracle(oddly_convolved, params, x, x)
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(ntk(fresh, params, x, engine="structured"), want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ntk(fresh, params, x[:2], x[2:], engine="structured"), want[:2, 2:], rtol=1e-10,
                               atol=1e-10)
    masks = half_masks(params)
    want = oracle(oddly_convolved, zeroed(params, masks), x, x, masks)
    np.testing.assert_allclose(ntk(fresh, params, x, engine="structured", masks=masks), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_kernel_is_the_same_under_jit_with_masks_known_or_traced(engine):
    apply_fn, params, x = named_network("mlp")
    masks = half_masks(params)
    want = ntk(apply_fn, params, x, engine=engine, masks=masks)
    known = jax.jit(lambda p, x: ntk(apply_fn, p, x, engine=engine, masks=masks))(params, x)
    traced = jax.jit(lambda p, x, m: ntk(apply_fn, p, x, engine=engine, masks=m, tile=3))(params, x, masks)
    np.testing.assert_allclose(known, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(traced, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda *a: jax.vmap(f)(*jax.tree.map(lambda v: v[None], a))],
                         ids=["jit", "vmap"])
@pytest.mark.parametrize("engine", ["structured", "jacobian"])
def test_a_network_may_close_over_traced_constants(engine, transform):
    """As over BatchNorm's averages where these are arguments: they scale weights and signals, and are added."""
    params = {"a": normal(0, (6, 5)), "b": normal(1, (5, 3)), "c": normal(2, (3,))}

    def kernel(params, x, scale):
        def apply_fn(p, x):
            hidden = relu((x @ p["a"] - scale) * jax.lax.rsqrt(scale))
            return hidden @ (p["b"] * scale[:, None]) + scale.sum() * p["c"]
        return ntk(apply_fn, params, x, engine=engine), ntk_trace(apply_fn, params, x)

    operands = params, normal(3, (4, 6)), jnp.linspace(0.5, 2.0, 5)
    for got, want in zip(transform(kernel)(*operands), kernel(*operands), strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_and_products_agree_with_the_kernel(name):
    apply_fn, params, x = named_network(name)
    masks = half_masks(params)
    v = normal(5, apply_fn(params, x).shape)
    for m in (None, masks):
        theta = ntk(apply_fn, params, x, engine="jacobian", masks=m)
        np.testing.assert_allclose(ntk_trace(apply_fn, params, x, masks=m), np.einsum("nnkk", theta), rtol=1e-12)
        product = ntk_matvec(apply_fn, params, x, masks=m)
        np.testing.assert_allclose(product(v), np.einsum("nmkl,ml->nk", theta, v), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(jax.jit(product)(v), product(v), rtol=1e-12, atol=1e-12)


def test_half_precision_contracts_in_float32():
    apply_fn, params, x = named_network("mlp", jnp.bfloat16)
    theta = ntk(apply_fn, params, x)
    assert theta.dtype == jnp.float32
    x = x.astype(jnp.float64)
    wide = oracle(apply_fn, jax.tree.map(lambda v: v.astype(jnp.float64), params), x, x)
    assert np.abs(np.asarray(theta) - wide).max() < 0.05 * np.abs(wide).max()


class TestBadInput:
    def test_inputs_of_another_shape(self):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"X2 holds examples of float64\[5\], but .* float64\[6\]"):
            ntk(apply_fn, params, x, x[:, :5])
        with pytest.raises(ValueError, match=r"X must be a batch of shape"):
            ntk(apply_fn, params, x[:0])

    def test_unknown_engine(self):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"engine must be one of 'auto', .* got 'fast'"):
            ntk(apply_fn, params, x, engine="fast")

    @pytest.mark.parametrize("tile", [0, -3, True])
    def test_tile_below_one(self, tile):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"tile must be a whole number of examples, 1 or more"):
            ntk(apply_fn, params, x, tile=tile)

    def test_several_outputs(self):
        _, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"must return one array \(N, \*out\), but returned 2 of shapes"):
            ntk_trace(lambda p, x: (mlp(p, x), x), params, x)

    def test_masks_of_another_structure(self):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"masks must have the tree structure of params"):
            ntk(apply_fn, params, x, masks=half_masks(params)[:2])
        with pytest.raises(TypeError, match=r"masks are booleans"):
            ntk_matvec(apply_fn, params, x, masks=params)

    def test_parameters_that_are_nan(self):
        apply_fn, params, x = named_network("mlp")
        params = [(params[0][0].at[0, 0].set(jnp.nan), params[0][1]), *params[1:]]
        with pytest.raises(ValueError, match=r"params leaf '0/0' holds 1 values that are NaN"):
            ntk(apply_fn, params, x)

    def test_a_vector_of_another_shape(self):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"v must have the shape \(7, 3\)"):
            ntk_matvec(apply_fn, params, x)(jnp.ones((7, 2)))

    def test_a_vector_that_is_complex_or_nan(self):
        apply_fn, params, x = named_network("mlp")
        with pytest.raises(ValueError, match=r"v must be real, got complex"):
            ntk_matvec(apply_fn, params, x)(jnp.full((7, 3), 1j))
        with pytest.raises(ValueError, match=r"v .*holds 21 values that are NaN"):
            ntk_matvec(apply_fn, params, x)(jnp.full((7, 3), jnp.nan))


def test_a_network_without_paths_has_a_kernel_by_layers():
    _, params, x = named_network("mlp")

    def net(p, x):
        return jnp.tanh(mlp(p, x))
    for engine in ("auto", "structured", "jacobian"):
        np.testing.assert_allclose(ntk(net, params, x, engine=engine), oracle(net, params, x, x), rtol=1e-10,
                                   atol=1e-12)


def test_a_kernel_that_is_0_is_no_underflow_where_outputs_need_no_parameters():
    x = normal(0, (2, 3))
    for net in (lambda w, x: x + jax.nn.relu(x @ w - 100), lambda w, x: x):
        assert not ntk(net, normal(1, (3, 3)), x).any()
        assert ntk_trace(net, normal(1, (3, 3)), x) == 0
        assert not ntk_matvec(net, normal(1, (3, 3)), x)(x).any()
    with pytest.raises(FloatingPointError, match="Θ vanishes"):
        ntk(lambda w, x: x + jax.nn.relu(x @ w[0]) @ w[1], [1e-200 * jnp.ones((3, 3), x.dtype)] * 2, jnp.abs(x))
