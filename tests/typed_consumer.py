"""What README does, as a user's typed code: mypy reads it in strict mode, nothing runs it."""

import jax
import jax.numpy as jnp
import optax
import pkjax as pk
from jaxtyping import Array, PyTree

digits = pk.data.load("digits", samples=8)
module = pk.models.fc(width=20, depth=3)
apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), digits.images))
ones = pk.ones_input(digits.images.shape[1:])
X = jnp.asarray(digits.images)


def scores(p: PyTree) -> PyTree:
    return pk.synflow_l2(apply_fn, p, ones)


pruned: pk.PruneResult = pk.prune(scores, params, compression=1, steps=100, scope=pk.layer_scope, min_per_layer=1)
kept: int = pruned.kept

for masks in (None, pruned.masks):
    report: pk.Report = pk.analyze(apply_fn, params, digits.images, masks=masks)
    bound: float = float(report.nu[0] * report.pi[0])
    held: dict[str, bool] = {name: claim.holds for name, claim in report.claims.items()}
    figure = pk.plots.report(report)

theta: Array = pk.ntk(apply_fn, params, X, memory_limit=2 * 10**9)
plan: pk.NtkPlan = pk.ntk_plan(apply_fn, params, X)
factor: Array = pk.data_factor(apply_fn, params, X)
trace: Array = pk.path_kernel.trace(apply_fn, params, ones)
values = pk.path_kernel.eigenvalues(apply_fn, params, ones, k=20)
polynomial: Array = pk.paths.polynomial(apply_fn, params, X, q=2)
run = pk.dynamics.linearized(theta, apply_fn(params, X), jnp.eye(8, 10), learning_rate=0.1, t=jnp.arange(4))
outputs: Array = run.outputs
alive: pk.Connectivity = pk.connectivity(apply_fn, params, ones, masks=pruned.masks)

optimizer, params = pk.masked(optax.adamw(0.01), pruned.masks), pk.apply_masks(params, pruned.masks)
state = optimizer.init(params)


def loss(params: PyTree) -> Array:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, X), jnp.asarray(digits.labels))
    return losses.mean()


gradient = pk.snip(loss, params), pk.grasp(loss, params), pk.path_exclusion(apply_fn, params, X)
pk.save_masks("masks.npz", pruned.masks)
back: PyTree = pk.load_masks("masks.npz", like=params)
