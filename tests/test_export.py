"""Every public function lowers for an accelerator, with all its products in full precision, and means there the same.

Matrix products and convolutions of float32 numbers default to TF32 on recent GPUs and to bfloat16 on TPUs, with 10 and
7 bits. The programs say how precise each is, so that no device is needed to see it.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from jax import export, lax
from pkjax import dynamics

PLATFORMS = ("cpu", "cuda", "tpu")
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape).astype(np.float32)
          for name, shape in {"bias": (3,), "head": (12, 3), "kernel": (2, 2, 2, 3)}.items()}
X = RNG.normal(size=(3, 5, 5, 2)).astype(np.float32)
ONES = np.ones((1, 5, 5, 2), np.float32)
LABELS = np.arange(3)
KEY = 5
SCALE = np.float32([1, 2, 3])


def net(p, x):
    """A convolution, a maximum over windows, a dense layer."""
    x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = lax.reduce_window(jnp.maximum(x, 0), np.float32(-np.inf), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ p["head"] + p["bias"]


def dense(p, x):
    """A layer of products alone."""
    return jnp.maximum(x[:, 0, 0] @ p["kernel"][0, 0], 0) @ p["head"][:3]


def gates(p, x):
    """The gates of `dense`, of each example as a batch of one."""
    return jax.vmap(lambda one: pk.paths.gates(dense, p, one[None]))(x)


def taps(p, x):
    """Zeros for the taps of the network."""
    return [jnp.zeros(site.shape, jnp.float32) for site in pk.paths.sites(net, p, x)[0]]


def loss(p):
    return optax.softmax_cross_entropy_with_integer_labels(net(p, jnp.asarray(X)), LABELS).mean()


def key():
    return jax.random.key(KEY)


def prune(p):
    return pk.prune(lambda q: pk.synflow(net, q, ONES), p, compression=1, steps=3).masks


class Case(NamedTuple):
    """A function of arrays."""

    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    products: bool = True


def of(fn: Callable[..., Any], *arguments: Any, products: bool = True) -> Case:
    return Case(fn, (PARAMS, *arguments), products)


CASES = {
    "ntk": of(lambda p, x: pk.ntk(net, p, x), X),
    "ntk, tiles": of(lambda p, x: pk.ntk(net, p, x, tile=2), X),
    "ntk, two batches": of(lambda p, x: pk.ntk(net, p, x, x[:2]), X),
    "ntk, jacobian": of(lambda p, x: pk.ntk(net, p, x, engine="jacobian"), X),
    "ntk_trace": of(lambda p, x: pk.ntk_trace(net, p, x), X),
    "ntk_matvec": of(lambda p, x, v: pk.ntk_matvec(net, p, x)(v), X, np.ones((3, 3), np.float32)),
    "ntk_frobenius": of(lambda p, x: pk.ntk_frobenius(net, p, x, key=key()), X),
    "ntk_trace_estimate": of(lambda p, x: pk.ntk_trace_estimate(net, p, x, key=key(), probes=2), X),
    "ntk_effective_rank": of(lambda p, x: pk.ntk_effective_rank(net, p, x, key=key()), X),
    "ntk_density": of(lambda p, x: vars(pk.ntk_density(net, p, x, key=key())), X),
    "data_factor": of(lambda p, x: pk.data_factor(net, p, x), X),
    "data_factor, products alone": of(lambda p, x: pk.data_factor(dense, p, x), X),
    "data_factor, constants": of(lambda p, x: pk.data_factor(lambda p, x: dense(p, x) * SCALE, p, x), X),
    "path_kernel.trace": of(lambda p, x: pk.path_kernel.trace(net, p, x), ONES),
    "path_kernel.gated_trace": of(lambda p, x: pk.path_kernel.gated_trace(net, p, x), X),
    "path_kernel.matvec": of(lambda p, x, u: pk.path_kernel.matvec(net, p, x)(u), ONES, PARAMS),
    "path_kernel.dense": of(lambda p, x: pk.path_kernel.dense(net, p, x), ONES),
    "path_kernel.effective_rank": of(lambda p, x: pk.path_kernel.effective_rank(net, p, x, key=key()), ONES),
    "path_kernel.effective_rank_estimate": of(
        lambda p, x: pk.path_kernel.effective_rank_estimate(net, p, x, key=key(), probes=4), ONES),
    "path_kernel.density": of(lambda p, x: vars(pk.path_kernel.density(net, p, x, key=key())), ONES),
    "paths.polynomial": of(lambda p, x: pk.paths.polynomial(net, p, x, q=2), ONES),
    "paths.scaled_polynomial": of(lambda p, x: pk.paths.scaled_polynomial(net, p, x, q=1), ONES),
    "paths.gates": of(lambda p, x: pk.paths.gates(net, p, x), X),
    "paths.dense_pairs": of(lambda p, x: pk.paths.dense_pairs(dense, p, x, gates(p, x)), X),
    "paths.tapped": of(lambda p, x: pk.paths.tapped(net, p, x, taps(p, x)), X[:1]),
    "paths.unit_weights": of(pk.paths.unit_weights, products=False),
    "paths.log_count": of(lambda p, x: pk.paths.log_count(net, p, x), ONES),
    "synflow": of(lambda p, x: pk.synflow(net, p, x), ONES),
    "synflow_l2": of(lambda p, x: pk.synflow_l2(net, p, x), ONES),
    "snip": of(lambda p: pk.snip(loss, p)),
    "grasp": of(lambda p: pk.grasp(loss, p)),
    "path_exclusion": of(lambda p, x: pk.path_exclusion(net, p, x), X),
    "ntk_trace_saliency": of(lambda p, x: pk.ntk_trace_saliency(net, p, x), X),
    "magnitude": of(pk.magnitude, products=False),
    "shuffle_masks": of(lambda p: pk.shuffle_masks(jax.tree.map(lambda v: v > 0, p), key=key()), products=False),
    "reinitialize": of(lambda p: pk.reinitialize(p, key=key()), products=False),
    "apply_masks": of(lambda p: pk.apply_masks(p, jax.tree.map(lambda v: v > 0, p)), products=False),
    "mean_input": of(lambda p, x: pk.mean_input(x), X, products=False),
    "random": of(lambda p: pk.random(p, key=key()), products=False),
    "prune": of(prune),
    "fisher": of(lambda p: pk.fisher(lambda q, batch: net(q, batch[0])[:, 0].mean(), p, [(jnp.asarray(X), LABELS)])),
    "ntk_sap": of(lambda p: pk.ntk_sap(net, p, X.shape[1:], key=key(), samples=2)),
    "ntk_alignment": of(lambda p, x, y: pk.ntk_alignment(net, p, x, y, key=key(), probes=2), X,
                        np.ones((3, 3), np.float32)),
    "kernel_alignment": Case(pk.kernel_alignment, (np.ones((3, 3, 2, 2), np.float32), np.ones((3, 2), np.float32))),
    "path_magnitude": of(lambda p, x: pk.path_magnitude(net, p, x), ONES),
    "paths.norm": of(lambda p, x: pk.paths.norm(net, p, x, q=1), ONES),
    "paths.distance": of(lambda p, x: pk.paths.distance(net, p, x, None, jax.tree.map(lambda v: v > 0, p)), ONES),
    "dynamics.linearize": of(lambda p, q, x: dynamics.linearize(net, p, x)(q), PARAMS, X),
    "dynamics.linearized": Case(lambda k, f, y: vars(dynamics.linearized(k, f, y, learning_rate=0.1, t=np.ones(2))),
                                (np.eye(9, dtype=np.float32).reshape(3, 3, 3, 3), *2 * (np.ones((3, 3), np.float32),))),
}


SEVERAL = {"analyze", "compare", "connectivity", "effective_units", "kernel_regression", "ntk_eigenpairs",
           "ntk_regression", "on_paths", "path_kernel.bounded_eigenvalues", "path_kernel.count_above",
           "path_kernel.eigenpairs", "path_kernel.eigenvalues", "paths.change_bound", "paths.frozen",
           "paths.path_condition", "paths.rescale", "phew", "shrink"}
"""What the host leads through several programs."""
WITHOUT = {"erk_scope", "exponential", "from_linen", "from_nnx", "global_scope", "inverted", "kernels", "layer_scope",
           "linear", "load_masks", "load_safetensors", "masked", "n_m_scope", "ntk_plan", "ones_input", "save_masks",
           "save_safetensors", "paths.dense_layers", "paths.factorize", "paths.power_of_two", "paths.sites",
           "paths.tied"}
"""What computes on the host, nothing of its own, or no more than a power."""


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def exported(case: Case) -> export.Exported:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), case.arguments)
    return export.export(jax.jit(case.fn), platforms=PLATFORMS)(*shapes)


def products(text: str) -> list[str]:
    """The products of a StableHLO program, without those of integers, which are exact."""
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    return [line for line in lines if not re.search(r"-> tensor<[^>]*u?i\d+>", line)]


def imprecise(text: str) -> list[str]:
    return [line for line in products(text) if line.count("HIGHEST") < 2]


def test_every_public_function_is_looked_at():
    public = {f"{prefix}{name}" for prefix, module in (("", pk), ("path_kernel.", pk.path_kernel), ("paths.", pk.paths))
              for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert public <= {name.split(",")[0] for name in CASES} | SEVERAL | WITHOUT


@pytest.mark.parametrize("name", CASES)
def test_functions_lower_for_accelerators_with_every_product_at_the_highest_precision(name):
    text = exported(CASES[name]).mlir_module()
    assert bool(products(text)) == CASES[name].products
    assert not imprecise(text), imprecise(text)[0]


def test_the_search_for_products_finds_those_of_a_lower_precision():
    @jax.jit
    def sum_of_three(a, b):
        with jax.default_matmul_precision("highest"):
            precise = a @ b
        return precise + a @ b + lax.dot(a, b, precision=("highest", "default"))

    text = export.export(sum_of_three, platforms=("cuda",))(jnp.ones((2, 2)), jnp.ones((2, 2))).mlir_module()
    assert len(products(text)) == 3
    assert len(imprecise(text)) == 2


def test_a_program_exported_from_any_host_computes_the_same(monkeypatch):
    """Hosts choose other forms of the same sum; a program that was exported keeps its host's."""
    cases = {name: CASES[name] for name in ("ntk", "path_kernel.trace", "data_factor")}
    wanted = {name: case.fn(*case.arguments) for name, case in cases.items()}
    of_processor = {name: exported(case) for name, case in cases.items()}
    jax.clear_caches()      # of what was traced for a processor
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        of_accelerator = {name: exported(case) for name, case in cases.items()}
    jax.clear_caches()
    for name, want in wanted.items():
        for program in (of_processor[name], of_accelerator[name]):
            got = program.call(*cases[name].arguments)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max()), err_msg=name)
    text, other = (each["path_kernel.trace"].mlir_module() for each in (of_processor, of_accelerator))
    assert "stablehlo.convolution" not in text
    assert "stablehlo.convolution" in other


def test_what_computes_in_several_programs_takes_every_product_at_the_highest_precision(tmp_path):
    wide = np.random.default_rng(1).normal(size=(4, 6, 5, 2)).astype(np.float32)      # shapes of this test alone
    params = {**PARAMS, "head": np.ones((12, 3), np.float32)}
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        pk.ntk_eigenpairs(net, params, wide, k=1)
        pk.path_kernel.eigenpairs(net, params, wide[:1] ** 2, k=1, method="lanczos")
        pk.connectivity(net, params, wide[:1] ** 2)
    finally:
        jax.config.update("jax_dump_ir_to", "")
    texts = [file.read_text() for file in tmp_path.glob("*.mlir")]
    assert sum(len(products(text)) for text in texts) > 20
    assert not [line for text in texts for line in imprecise(text)]
