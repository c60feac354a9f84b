"""Programs: equal where the operations are, apart from their arrays, and no staler than their function."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pkjax.programs.program import BoundProgram, Hoisted, trace

from tests.cases import FLOAT, normal

W, X = normal(0, (3, 4)), normal(1, (2, 3))


def program(net):
    return trace(net, W, X)[0]


def scaled(factor):
    return lambda w, x: factor * (x @ w)


def ruled(factor, function=lambda v: v):
    @jax.custom_vjp
    def identity(v):
        return function(v)
    identity.defvjp(lambda v: (function(v), None), lambda _, g: (factor * g,))
    return lambda w, x: identity(x @ w)


def sloped(slope):
    @jax.custom_jvp
    def relu(v):
        return jnp.maximum(v, 0)
    relu.defjvp(lambda primals, tangents: (relu(*primals), jnp.where(primals[0] > 0, 1, slope) * tangents[0]))
    return lambda w, x: relu(x @ w)


def of_gradient(factor):
    @jax.custom_gradient
    def identity(v):
        return v, lambda g: factor * g
    return lambda w, x: identity(x @ w)


def around_relu(factor):
    relu = jax.custom_jvp(jax.nn.relu)
    relu.defjvps(lambda t, out, v: factor * t)
    return lambda w, x: relu(x @ w)


def reduced(combine):
    return lambda w, x: lax.reduce(x @ w, np.zeros((), FLOAT), lambda a, b: combine(a, b), (1,))


EQUAL = {
    "another closure": (scaled, 2.0, 2.0), "another array": (lambda a: lambda w, x: x @ w * a, normal(2, (4,)),
                                                             normal(3, (4,))),
    "the same rule": (ruled, 0.5, 0.5), "the same slope": (sloped, 0.25, 0.25),
    "the same gradient": (of_gradient, 3, 3),
    "relu": (lambda _: lambda w, x: jax.nn.relu(x @ w), 0, 1), "the same reduction": (reduced, jnp.add, lax.add),
    "an array within jit": (lambda a: jax.jit(lambda w, x: x @ w + a), normal(2, (4,)), normal(3, (4,))),
    "an array within nested jits": (lambda a: jax.jit(lambda w, x: jax.jit(lambda v: v @ w + a)(x)), normal(2, (4,)),
                                    normal(3, (4,))),
}
DIFFERENT = {
    "a literal": (scaled, 2.0, 3.0),
    "the sign of zero": (lambda a: lambda w, x: jnp.arctan2(x @ w, a), 0.0, -0.0),
    "an axis": (lambda axis: lambda w, x: (x @ w).sum(axis), 0, 1), "another rule": (ruled, 0.5, 2.0),
    "another slope": (sloped, 0.25, 0.5), "another gradient": (of_gradient, 3, 4), "a rule around JAX's own": (
        around_relu, 2.0, 3.0), "another reduction": (reduced, lax.add, lax.max),
    "a shape": (lambda n: lambda w, x: jnp.tile(x @ w, (1, n)), 1, 2), "a type": (
        lambda dtype: lambda w, x: (x @ w).astype(dtype), jnp.float16, jnp.bfloat16),
    "a precision": (lambda p: lambda w, x: lax.dot(x, w, precision=p), "highest", "default"),
    "an order": (lambda first: lambda w, x: jnp.tanh(2 * (x @ w)) if first else 2 * jnp.tanh(x @ w), True, False),
    "a body": (lambda f: lambda w, x: lax.scan(lambda h, _: (f(h), None), x @ w, None, length=2)[0], jnp.sin, jnp.cos),
    "a threshold": (lambda a: lambda w, x: jnp.maximum(x @ w, a), jnp.zeros((), FLOAT), jnp.ones((), FLOAT)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_programs_with_the_same_operations_are_equal(name):
    make, one, other = EQUAL[name]
    a, b = program(make(one)), program(make(other))
    assert a == b
    assert hash(a) == hash(b)
    assert a is b, "equal programs are one object, whose jaxpr the caches of JAX know"


@pytest.mark.parametrize("name", DIFFERENT)
def test_programs_that_differ_in_anything_static_are_not(name):
    make, one, other = DIFFERENT[name]
    assert program(make(one)) != program(make(other))


def test_another_structure_of_arguments_is_another_program():
    assert trace(lambda p, x: x @ p["a"], {"a": W}, X)[0] != trace(lambda p, x: x @ p["b"], {"b": W}, X)[0]


@pytest.mark.parametrize("name", EQUAL | DIFFERENT)
@pytest.mark.parametrize("which", [1, 2])
def test_a_program_computes_what_its_function_does_and_has_its_derivative(name, which):
    make, *values = (EQUAL | DIFFERENT)[name]
    net = make(values[which - 1])
    bound = BoundProgram(*trace(net, W, X))
    np.testing.assert_allclose(bound(W, X), net(W, X))
    if "reduction" in name:      # JAX has no derivative of lax.reduce
        return
    own, through = (jax.grad(lambda w, f=f: (f(w, X).astype(FLOAT)**2).sum())(W) for f in (net, bound))
    np.testing.assert_allclose(through, own)


def test_arrays_are_hoisted_from_nested_calls_once():
    a, b = normal(2, (4,)), normal(3, (4,))
    inner = jax.jit(lambda v: v * a)
    found, constants = trace(lambda w, x: jax.jit(lambda v: jax.checkpoint(inner)(v) + b)(x @ w) - a, W, X)
    assert {id(c) for c in constants} == {id(a), id(b)}
    assert [c.shape for c in found.constants] == [(4,), (4,)]
    assert all(isinstance(c, Hoisted) for c in found.consts)


def test_constants_that_operations_ask_for_stay_in_the_program():
    threshold = jnp.zeros(4, FLOAT)
    found, constants = trace(lambda w, x: jnp.maximum(x @ w, threshold), W, X)
    assert constants == ()
    assert [c.shape for c in found.consts if not isinstance(c, Hoisted)] == [(4,)]


def test_a_program_keeps_no_array_alive():
    closed_over = normal(2, (4,)) + 0
    array = weakref.ref(closed_over)
    kept, constants = trace(lambda w, x, a=closed_over: jax.jit(lambda v: v + a)(x @ w), W, X)
    del closed_over, constants
    gc.collect()
    assert array() is None
    assert kept.constants[0].shape == (4,)


def test_what_a_function_closes_over_is_read_at_each_trace():
    class Holder:
        value, array = 2.0, normal(2, (4,))

    def net(w, x):
        return Holder.value * (x @ w) + Holder.array
    first = BoundProgram(*trace(net, W, X))
    np.testing.assert_allclose(first(W, X), net(W, X))
    before = net(W, X)
    Holder.value, Holder.array = 3.0, normal(3, (4,))
    second = BoundProgram(*trace(net, W, X))
    np.testing.assert_allclose(second(W, X), net(W, X))
    np.testing.assert_allclose(first(W, X), before)


def test_the_shapes_of_a_program_suffice_to_evaluate_its_shape():
    array = normal(2, (4,))
    found, _ = trace(lambda w, x: x @ w + array, W, X)
    assert jax.eval_shape(found.shapes, W, X).shape == (2, 4)


def test_other_arguments_are_refused():
    found, constants = trace(lambda p, x: x @ p["a"], {"a": W}, X)
    with pytest.raises(ValueError, match="the program takes"):
        found(constants, {"b": W}, X)
