"""Linearised training against matrix functions, against gradient descent itself, and against its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from pkjax import ntk
from pkjax.dynamics import flow, linearize, linearized

from tests.cases import normal
from tests.dynamics.cases import T, cross_entropy, matrix_of, mlp, network, norms, problem


def squared(y):
    return lambda f: 0.5 * ((f - y) ** 2).sum()


def largest(theta):
    return float(np.linalg.eigvalsh(matrix_of(theta))[-1])


def test_the_closed_form_is_that_of_the_matrix_exponential_and_the_inverse():
    theta, f0, y = problem()
    eta, matrix, error = 0.05, matrix_of(theta), np.asarray(f0 - y).ravel()
    run = linearized(theta, f0, y, learning_rate=eta, t=T)
    for i, t in enumerate(T):
        decay = scipy.linalg.expm(-eta * matrix * t)
        f = np.asarray(y).ravel() + decay @ error
        c = np.linalg.solve(matrix, error - decay @ error)
        np.testing.assert_allclose(run.outputs[i].ravel(), f, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(run.coefficients[i].ravel(), c, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(run.weight_change[i], np.sqrt(max(c @ matrix @ c, 0)), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(run.output_norm[i], np.linalg.norm(f), rtol=1e-11)
        np.testing.assert_allclose(run.loss[i], ((f - np.asarray(y).ravel()) ** 2).sum() / 2, rtol=1e-10)
    np.testing.assert_array_equal(run.times, T)


def test_a_single_time_has_no_axis_and_a_matrix_is_a_kernel_too():
    theta, f0, y = problem()
    many = linearized(theta, f0, y, learning_rate=0.05, t=T)
    one = linearized(matrix_of(theta), f0, y, learning_rate=0.05, t=2.0)
    assert one.outputs.shape == (4, 2)
    assert one.loss.shape == ()
    for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        np.testing.assert_allclose(a, b[2], rtol=1e-10)


@pytest.mark.parametrize("step", [0.1, 0.9, 1.0, 1.7, 2.0, 2.1])
def test_discrete_steps_are_gradient_descent_on_the_linearised_network(step):
    """The step is ηλ of the largest eigenvalue: beyond 2 both diverge, and alike."""
    theta, f0, y = problem()
    params, x, _, _ = network()
    eta, tangent = step / largest(theta), linearize(mlp, params, x)

    @jax.jit
    def descend(p):
        loss, gradient = jax.value_and_grad(lambda p: squared(y)(tangent(p)))(p)
        return jax.tree.map(lambda a, g: a - eta * g, p, gradient), (loss, tangent(p), norms_of_change(p, params))

    def norms_of_change(p, q):
        return jnp.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (p, q)), strict=True)))

    _, (loss, outputs, change) = jax.lax.scan(lambda p, _: descend(p), params, length=61)
    run = linearized(theta, f0, y, learning_rate=eta, t=np.arange(61), discrete=True)
    np.testing.assert_allclose(run.outputs, outputs, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(run.loss, loss, rtol=1e-10)
    np.testing.assert_allclose(run.weight_change, change, rtol=1e-10, atol=1e-13)
    assert (run.loss[-1] > 10 * run.loss[0]) == (step > 2)


def test_beyond_the_range_of_numbers_descent_is_infinite_and_its_share_of_nothing_is_nothing():
    theta, y = np.diag([1.0, 2.0]), np.zeros((2, 1))
    run = linearized(theta, np.ones((2, 1)), y, learning_rate=10.0, t=np.array([10, 5000]), discrete=True)
    assert np.isfinite(run.outputs[0]).all()
    assert run.loss[1] == run.weight_change[1] == run.output_norm[1] == np.inf
    still = linearized(theta, y, y, learning_rate=10.0, t=5000, discrete=True)
    assert not still.outputs.any()
    assert still.loss == still.weight_change == 0


def test_the_coefficients_of_each_mode_are_a_geometric_sum():
    z, steps = np.array([0, 1e-14, 1e-7, 1e-4, 0.3, 0.5, 0.51, 1.0, 1.4, 2.0]), [0, 1, 2, 7, 1000]
    run = linearized(np.diag(z), np.ones((10, 1)), np.zeros((10, 1)), learning_rate=1.0, t=np.array(steps),
                     discrete=True)
    want = np.array([sum((1 - z) ** s for s in range(n)) + 0 * z for n in steps])
    np.testing.assert_allclose(run.coefficients[..., 0], want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run.outputs[..., 0], 1 - z * want, rtol=1e-12, atol=1e-12)


def test_many_small_steps_are_the_flow():
    theta, f0, y = problem()
    eta = 0.05
    continuous = linearized(theta, f0, y, learning_rate=eta, t=T)
    gaps = []
    for steps in (10, 100, 1000):
        fine = linearized(theta, f0, y, learning_rate=eta / steps, t=(T * steps).astype(int), discrete=True)
        gaps.append(float(jnp.abs(fine.outputs - continuous.outputs).max()))
    np.testing.assert_allclose(gaps[:-1], 10 * np.array(gaps[1:]), rtol=0.2)


def test_a_real_network_at_a_tiny_learning_rate_agrees_to_first_order():
    """Halving η quarters the distance between gradient descent and the linearisation, after as many steps."""
    theta, f0, y = problem()
    params, x, _, _ = network()
    gaps = []
    for eta in (1e-4, 5e-5):
        p = params
        for _ in range(3):
            p = jax.tree.map(lambda a, g: a - eta * g, p, jax.grad(lambda p: squared(y)(mlp(p, x)))(p))  # noqa: B023
        run = linearized(theta, f0, y, learning_rate=eta, t=3, discrete=True)
        moved = float(jnp.abs(run.outputs - f0).max())
        gaps.append(float(jnp.abs(mlp(p, x) - run.outputs).max()))
        assert gaps[-1] < 20 * eta * moved
    assert 3.5 < gaps[0] / gaps[1] < 4.5


def test_a_wide_network_follows_its_linearisation():
    width = 8192
    params = {"a": normal(0, (3, width)), "b": normal(1, (width, 1))}
    x, y = normal(2, (4, 3)), normal(3, (4, 1))

    def wide(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] / width**0.5

    theta = ntk(wide, params, x)
    eta = 0.5 / largest(theta)

    @jax.jit
    def descend(p, _):
        return jax.tree.map(lambda a, g: a - eta * g, p, jax.grad(lambda p: squared(y)(wide(p, x)))(p)), wide(p, x)

    last, outputs = jax.lax.scan(descend, params, length=101)
    run = linearized(theta, wide(params, x), y, learning_rate=eta, t=np.arange(101), discrete=True)
    scale = float(jnp.abs(outputs - outputs[0]).max())
    assert scale > 0.5
    assert float(jnp.abs(run.outputs - outputs).max()) < 0.03 * scale
    change = norms(jax.tree.map(jnp.subtract, last, params))
    np.testing.assert_allclose(float(run.weight_change[100]), change, rtol=0.03)


def test_flow_under_the_squared_error_is_the_closed_form():
    theta, f0, y = problem()
    times = np.array([2.0, 0.0, 17.0, 2.0, 0.3])
    want = linearized(theta, f0, y, learning_rate=0.05, t=times)
    got = flow(theta, f0, squared(y), learning_rate=0.05, t=times, rtol=1e-9)
    for name in ("times", "outputs", "coefficients", "weight_change", "output_norm", "loss"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-6, atol=1e-7, err_msg=name)
    one = flow(theta, f0, squared(y), learning_rate=0.05, t=2.0)
    np.testing.assert_allclose(one.outputs, want.outputs[0], rtol=1e-4, atol=1e-5)


def test_flow_of_a_stiff_kernel_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    theta = basis * 10.0 ** np.arange(-2, 4) @ basis.T
    f0, y = rng.normal(size=(2, 3, 2))
    times = np.array([1e-3, 1.0, 50.0])
    got = flow(theta, f0, squared(y), learning_rate=1.0, t=times, rtol=1e-8)
    want = linearized(theta, f0, y, learning_rate=1.0, t=times)
    np.testing.assert_allclose(got.outputs, want.outputs, atol=1e-6)
    np.testing.assert_allclose(got.weight_change, want.weight_change, rtol=1e-6)


def test_flow_under_cross_entropy_is_the_limit_of_small_steps():
    theta, f0, _ = problem()
    matrix, eta, end = jnp.asarray(matrix_of(theta)), 0.05, 20.0

    @functools.partial(jax.jit, static_argnames="steps")
    def descend(steps):
        def step(state, _):
            f, c = state
            g = eta * end / steps * jax.grad(cross_entropy)(f)
            return (f - (matrix @ g.ravel()).reshape(f.shape), c + g), None
        return jax.lax.scan(step, (f0, jnp.zeros_like(f0)), length=steps)[0]

    coarse, fine = descend(20_000), descend(40_000)
    f, c = jax.tree.map(lambda a, b: 2 * b - a, coarse, fine)         # Richardson: the error is of second order
    run = flow(theta, f0, cross_entropy, learning_rate=eta, t=end, rtol=1e-9)
    np.testing.assert_allclose(run.outputs, f, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(run.coefficients, c, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(run.loss, cross_entropy(f), rtol=1e-6)
    np.testing.assert_allclose(run.weight_change**2, (c.ravel() @ matrix @ c.ravel()), rtol=1e-6)


def test_a_flow_that_reaches_infinity_is_an_error():
    with pytest.raises(RuntimeError, match="could not be followed to t = 10"):
        flow(np.eye(1), np.ones((1, 1)), lambda f: -(f**4).sum(), learning_rate=1.0, t=10.0)


def test_without_a_slope_or_without_time_nothing_moves():
    theta, f0, _ = problem()
    for loss_fn, rate, t in ((lambda f: 0 * f.sum(), 1.0, 3.0), (cross_entropy, 0.0, 3.0), (cross_entropy, 1.0, 0.0)):
        run = flow(theta, f0, loss_fn, learning_rate=rate, t=np.array([t]))
        np.testing.assert_array_equal(run.outputs[0], f0)
        assert run.weight_change[0] == 0


@pytest.mark.parametrize("discrete", [False, True])
def test_where_inputs_are_twins_the_kernel_is_singular_and_the_weights_are_those_of_descent(discrete):
    params, x, _, y = network()
    x = x.at[1].set(x[0])
    theta, f0 = ntk(mlp, params, x), mlp(params, x)
    matrix, eta = matrix_of(theta), 0.5 / largest(theta)
    assert np.linalg.matrix_rank(matrix) == 6
    run = linearized(theta, f0, y, learning_rate=eta, t=np.array([0, 3, 1000]), discrete=discrete)
    for i, t in enumerate((0, 3, 1000)):
        step = np.eye(8) - eta * matrix
        decay = np.linalg.matrix_power(step, t) if discrete else scipy.linalg.expm(-eta * t * matrix)
        error = np.asarray(f0 - y).ravel()
        np.testing.assert_allclose(run.outputs[i].ravel(), np.asarray(y).ravel() + decay @ error, atol=1e-10)
        seen = np.linalg.pinv(matrix, rcond=1e-10) @ (error - decay @ error)
        # Where Θ is 0 the error stays, and the coefficients grow with it: ηt for each unit.
        blind = (np.eye(8) - np.linalg.pinv(matrix, rcond=1e-10) @ matrix) @ error * eta * t
        np.testing.assert_allclose(run.coefficients[i].ravel(), seen + blind, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(run.weight_change[i], np.sqrt(seen @ matrix @ seen), rtol=1e-8, atol=1e-10)
    nothing = linearized(np.zeros((8, 8)), f0, y, learning_rate=2.0, t=3, discrete=discrete)
    np.testing.assert_allclose(nothing.coefficients, 6 * (f0 - y), rtol=1e-14)
    np.testing.assert_allclose(nothing.outputs, f0, rtol=1e-14)


def test_dynamics_compile_and_differentiate():
    theta, f0, y = problem()
    run = jax.jit(lambda a, b, c, r, t: linearized(a, b, c, learning_rate=r, t=t))(theta, f0, y, 0.05, jnp.asarray(T))
    want = linearized(theta, f0, y, learning_rate=0.05, t=T)
    for a, b in zip(*map(jax.tree.leaves, (run, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    rates = jnp.asarray([0.01, 0.05])
    rows = jax.vmap(lambda r: linearized(theta, f0, y, learning_rate=r, t=3, discrete=True).loss)(rates)
    np.testing.assert_allclose(rows[1], linearized(theta, f0, y, learning_rate=0.05, t=3, discrete=True).loss)
    # dL/dt = −η ‖∇L‖²_Θ along the flow
    slope = jax.grad(lambda t: linearized(theta, f0, y, learning_rate=0.05, t=t).loss)(2.0)
    error = np.asarray(want.outputs[2] - y).ravel()
    np.testing.assert_allclose(slope, -0.05 * error @ matrix_of(theta) @ error, rtol=1e-9)
    # ∂f/∂λ of a single mode with f_0 − y = 1 is −ηt e^{−ηλt}, at λ = 0 too
    one, z = jnp.ones((1, 1)), jnp.asarray([0.0, 1e-7, 0.3])
    by = jax.vmap(jax.grad(lambda s: linearized(s * one, one, 0 * one, learning_rate=1.0, t=2.0).outputs[0, 0]))(z)
    np.testing.assert_allclose(by, -2 * np.exp(-2 * z), rtol=1e-9)


def test_kernels_and_outputs_of_single_precision_are_solved_in_double():
    theta, f0, y = problem()
    single = linearized(theta.astype(jnp.float32), f0.astype(jnp.float32), y, learning_rate=0.05, t=T)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(single))
    np.testing.assert_allclose(single.outputs, linearized(theta, f0, y, learning_rate=0.05, t=T).outputs, atol=1e-5)
    with jax.enable_x64(False):
        arrays = [np.asarray(a, np.float32) for a in (theta, f0, y)]
        for run in (linearized(*arrays, learning_rate=0.05, t=T),
                    flow(*arrays[:2], squared(jnp.asarray(arrays[2])), learning_rate=0.05, t=T)):
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(run))
            np.testing.assert_allclose(run.outputs, single.outputs, atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"theta": np.ones((3, 3))}, r"theta must have the shape \(4, 4, 2, 2\) .* or \(8, 8\) .*, got \(3, 3\)"),
    ({"theta": np.triu(np.ones((8, 8)))}, "theta must be symmetric"),
    ({"theta": np.full((8, 8), np.nan)}, "theta must be symmetric and finite"),
    ({"theta": -np.eye(8)}, "theta must be positive semidefinite.*eigenvalue -1"),
    ({"y": np.ones((4,))}, r"y must have the shape \(4, 2\).*one-hot.*got \(4,\)"),
    ({"f0": np.ones((0, 2))}, "f0 must hold the outputs"),
    ({"learning_rate": -0.1}, "learning_rate must be finite and 0 or more, got -0.1"),
    ({"learning_rate": np.ones(2)}, r"learning_rate a number, got shapes \(\) and \(2,\)"),
    ({"t": np.ones((2, 2))}, r"t must be a number or a vector"),
    ({"t": -1}, "t must be finite and 0 or more, got -1"),
    ({"t": 1.5, "discrete": True}, "t must be whole numbers of steps"),
])
def test_bad_requests_are_refused(change, message):
    theta, f0, y = problem()
    arguments = {"theta": theta, "f0": f0, "y": y, "learning_rate": 0.1, "t": 1} | change
    with pytest.raises(ValueError, match=message):
        linearized(arguments.pop("theta"), arguments.pop("f0"), arguments.pop("y"), **arguments)


def test_bad_requests_of_the_flow_are_refused():
    theta, f0, _ = problem()
    options = {"learning_rate": 0.1, "t": 1.0}
    for message, call in (
        (r"loss_fn must map outputs \(4, 2\) to one scalar.*\(4, 2\)", lambda: flow(theta, f0, lambda f: f, **options)),
        ("finite gradient at f0", lambda: flow(theta, f0, lambda f: jnp.sqrt(f - f).sum(), **options)),
        ("rtol must be positive", lambda: flow(theta, f0, cross_entropy, **options, rtol=0.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
