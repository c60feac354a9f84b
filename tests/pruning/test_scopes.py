"""Densities of layers against bisection, and shares against every way to round them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pkjax.pruning.scopes import DensityScope, apportion, erk_densities, erk_scope, layer_scope

LENET = [(784, 300), (300, 100), (100, 10)]
RESNET = [(3, 3, 3, 16), *[(3, 3, 16, 16)] * 6, (3, 3, 16, 32), (1, 1, 16, 32), *[(3, 3, 32, 32)] * 5, (32, 10)]

shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)
density = st.floats(1e-4, 1.0)


def by_bisection(shapes, density):
    """The densities min(1, ε Σ/Π) for the ε that bisection finds, one layer at a time."""
    def at(epsilon):
        return [min(1.0, epsilon * sum(shape) / math.prod(shape)) for shape in shapes]

    def kept(epsilon):
        return sum(d * math.prod(shape) for d, shape in zip(at(epsilon), shapes, strict=True))

    low, high = 0.0, float(max(math.prod(shape) for shape in shapes))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < density * sum(map(math.prod, shapes)) else (low, middle)
    return at(high)


@settings(max_examples=60, deadline=None)
@given(shapes, density)
@example(LENET, 0.05)
@example(RESNET, 0.1)
@example(RESNET, 0.9)
@example([(5,), (5, 5), (1, 1)], 1.0)
def test_erk_is_what_bisection_finds(shapes, density):
    found = erk_densities(shapes, density)
    sizes = [math.prod(shape) for shape in shapes]
    assert math.isclose(np.dot(found, sizes), density * sum(sizes), rel_tol=1e-12)
    assert all(0.0 < d <= 1.0 for d in found)
    np.testing.assert_allclose(found, by_bisection(shapes, density), rtol=1e-9)


def test_erk_of_dense_layers_is_erdos_renyi():
    found = erk_densities(LENET, 0.05)
    ratios = [d * n * m / (n + m) for d, (n, m) in zip(found, LENET, strict=True)]
    assert np.ptp(ratios) < 1e-12 * ratios[0]


def test_layers_become_dense_in_the_order_of_weights_per_axis_length():
    def dense(density):
        return [i for i, d in enumerate(erk_densities(RESNET, density)) if d == 1.0]

    assert dense(0.05) == []
    assert dense(0.1) == [14]                 # the last layer: 320 weights, axes of 42 together
    assert dense(0.5) == [0, 8, 14]           # then the 1x1 convolution, 512 to 50, and the first one, 432 to 25
    assert dense(0.7) == [*range(7), 8, 14]   # then all of 16 channels, 2304 to 38
    assert dense(1.0) == list(range(15))


@settings(max_examples=30, deadline=None)
@given(shapes, density, density)
def test_no_layer_gets_sparser_as_the_whole_gets_denser(shapes, one, other):
    sparse, dense = erk_densities(shapes, min(one, other)), erk_densities(shapes, max(one, other))
    assert all(s <= d * (1 + 1e-12) for s, d in zip(sparse, dense, strict=True))


def test_leaves_without_axes_or_entries_have_densities_too():
    assert erk_densities([(), (4, 4)], 0.5) == erk_densities([(1,), (4, 4)], 0.5)
    assert erk_densities([(0, 3), (4, 4)], 0.5) == [1.0, 0.5]
    assert erk_densities([(0, 3)], 0.5) == [1.0]
    assert erk_densities([], 0.5) == []


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_erk_refuses_what_is_no_density(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        erk_densities(LENET, density)


def test_erk_scope_makes_every_leaf_a_group_of_its_own():
    params = {"a": jnp.ones((2, 3)), "b": [jnp.ones((3, 3)), jnp.ones((3, 2))]}
    pairs = jax.tree_util.tree_leaves_with_path(params)
    assert len({erk_scope(path, leaf) for path, leaf in pairs}) == 3
    assert all(erk_scope(path, leaf) == layer_scope(path, leaf) for path, leaf in pairs)
    assert erk_scope.densities is erk_densities
    assert not hasattr(layer_scope, "densities")
    assert DensityScope(layer_scope, erk_densities) == erk_scope
    assert hash(DensityScope(layer_scope, erk_densities)) == hash(erk_scope)


def by_trying_all(quotas, sizes, total, lower):
    """The whole numbers of that sum that are nearest to the quotas in the least-squares sense."""
    choices = itertools.product(*(range(low, n + 1) for low, n in zip(lower, sizes, strict=True)))
    return min(math.fsum((c - q) ** 2 for c, q in zip(counts, quotas, strict=True))
               for counts in choices if sum(counts) == total)


@st.composite
def shares(draw):
    """Densities and sizes of few small groups, a total next to what they ask for, and bounds that it can meet."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    densities = draw(st.lists(st.sampled_from([0.0, 1 / 3, 0.5, 0.71, 1.0]), min_size=len(sizes), max_size=len(sizes)))
    total = round(math.fsum(d * n for d, n in zip(densities, sizes, strict=True)))
    lower, left = [], total
    for n in sizes:
        lower.append(draw(st.integers(0, min(n, left))))
        left -= lower[-1]
    return densities, sizes, total, lower


@settings(max_examples=100, deadline=None)
@given(shares())
def test_shares_add_up_and_are_as_near_to_the_quotas_as_can_be(case):
    densities, sizes, total, lower = case
    quotas = [d * n for d, n in zip(densities, sizes, strict=True)]
    for bounds, at_least in (([0] * len(sizes), None), (lower, lower)):
        counts = apportion(densities, sizes, total, at_least=at_least)
        assert sum(counts) == total
        assert all(low <= c <= n for low, c, n in zip(bounds, counts, sizes, strict=True))
        distance = math.fsum((c - q) ** 2 for c, q in zip(counts, quotas, strict=True))
        assert distance <= by_trying_all(quotas, sizes, total, bounds) + 1e-9


@settings(max_examples=30, deadline=None)
@given(shapes, density)
@example(RESNET, 0.013)
def test_erk_counts_are_exact_and_can_be_counted_back_step_by_step(shapes, density):
    sizes = [math.prod(shape) for shape in shapes]
    after = [0] * len(sizes)
    for step in range(5, -1, -1):
        total = round(density ** (step / 5) * sum(sizes))
        counts = apportion(erk_densities(shapes, density ** (step / 5)), sizes, total, at_least=after)
        assert sum(counts) == total
        assert all(a <= c <= n for a, c, n in zip(after, counts, sizes, strict=True))
        after = counts
    assert counts == sizes


def test_of_equal_remainders_the_first_is_rounded_up():
    assert apportion([0.5] * 5, [3] * 5, 7) == [2, 2, 1, 1, 1]
    assert apportion([0.5] * 5, [3] * 5, 8) == [2, 2, 2, 1, 1]


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"keep 5\.0 of 10 weights, not 6"):
        apportion([0.5, 0.5], [4, 6], 6)
    with pytest.raises(ValueError, match=r"densities must lie in \[0, 1\], but one is 1\.5"):
        apportion([1.5, 0.5], [4, 6], 9)
    with pytest.raises(ValueError, match="group's size 4, but one bound is 5"):
        apportion([0.5, 0.5], [4, 6], 5, at_least=[5, 0])
    with pytest.raises(ValueError, match="adds up to 6, more than the total of 5"):
        apportion([0.5, 0.5], [4, 6], 5, at_least=[3, 3])
    with pytest.raises(ValueError, match="argument 2"):
        apportion([0.5, 0.5], [4], 2)
