"""Scores and masks against PyTorch, written from the formulae with its own autograd and its own sorting.

The PyTorch side keeps weights in the layout of the parameters here and permutes them as it runs, so that scores
can be compared entry by entry. Its path network is the published procedure of SynFlow (absolute weights, a forward
pass of ones, |gradient · weight|) with BatchNorm's running mean turned so that it adds, as every constant does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import models
from pkjax.adapters import from_linen
from pkjax.pruning.prune import prune
from pkjax.pruning.scores.data_free import synflow, synflow_l2
from pkjax.pruning.scores.loss import grasp, snip
from pkjax.trees import kernels, leaf_names, select

torch = pytest.importorskip("torch")
F = torch.nn.functional

CLASSES, BATCH, EPSILON = 10, 6, 1e-5


@dataclass(frozen=True)
class Case:
    """One network on both sides."""

    apply_fn: Callable[..., Any]
    params: Any
    torch_network: Callable[..., Any]  # (weights by name, x) -> logits
    torch_paths: Callable[..., Any]  # (weights by name, z, q, pool) -> path polynomials
    shape: tuple[int, ...]


def conv(h, kernel, stride=1):
    """Convolve channels-last input with a kernel in (height, width, in, out) order."""
    kernel = kernel.permute(3, 2, 0, 1)
    out = F.conv2d(h.permute(0, 3, 1, 2), kernel, stride=stride, padding=kernel.shape[-1] // 2)
    return out.permute(0, 2, 3, 1)


def fc_case():
    module = models.fc(width=30, depth=4, param_dtype=jnp.float64)
    shape = (8, 8, 1)
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape))), 1)["params"]
    layers = [f"Dense_{i}" for i in range(5)]

    def network(w, x):
        h = x.flatten(1)
        for name in layers[:-1]:
            h = torch.relu(h @ w[f"{name}/kernel"] + w[f"{name}/bias"])
        return h @ w["Dense_4/kernel"] + w["Dense_4/bias"]

    def paths(w, z, q, pool):
        h = z.flatten(1)
        for name in layers:
            h = h @ w[f"{name}/kernel"] + w[f"{name}/bias"]
        return h

    apply_fn, params = from_linen(module, {"params": params})
    return Case(apply_fn, params, network, paths, shape)


def resnet20_case():
    """ResNet-20 with frozen BatchNorm whose averages, scales and biases are those of no fresh network."""
    module = models.resnet20(param_dtype=jnp.float64)
    shape = (8, 8, 3)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape))), 2)
    params, stats = variables["params"], variables["batch_stats"]
    constants = {
        name: torch.tensor(np.asarray(leaf))
        for name, leaf in zip(leaf_names(stats), jax.tree.leaves(stats), strict=True)
    }

    def forward(w, x, norm, act, average):
        def unit(h, name, stride):
            h = conv(h, w[f"{name}/kernel"], stride)
            return norm(
                h,
                constants[f"{name}_norm/mean"],
                constants[f"{name}_norm/var"],
                w[f"{name}_norm/scale"],
                w[f"{name}_norm/bias"],
            )

        h = act(unit(x, "stem", 1))
        for stage in range(3):
            for block in range(3):
                name, stride = f"stage{stage}_block{block}", 2 if stage > 0 and block == 0 else 1
                out = unit(act(unit(h, f"{name}_conv0", stride)), f"{name}_conv1", 1)
                h = act(out + (unit(h, f"{name}_shortcut", stride) if stride == 2 else h))
        return average(h) @ w["head/kernel"] + w["head/bias"]

    def network(w, x):
        def norm(h, mean, var, scale, bias):
            return (h - mean) / torch.sqrt(var + EPSILON) * scale + bias

        return forward(w, x, norm, torch.relu, lambda h: h.mean((1, 2)))

    def paths(w, z, q, pool):
        def norm(h, mean, var, scale, bias):
            return (h + mean.abs() ** q) * (var + EPSILON) ** (-q / 2) * scale + bias

        def average(h):
            return h.sum((1, 2)) / (h.shape[1] * h.shape[2]) ** q

        return forward(w, z, norm, lambda h: h, average)

    apply_fn, params = from_linen(module, variables)
    return Case(apply_fn, params, network, paths, shape)


def pooled_case():
    """Max-pooling, where "sum" and the published codes' "max" differ."""
    rng = np.random.default_rng(4)
    params = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 6)) / 3), "bias": jnp.asarray(rng.normal(size=6))},
        "last": {"kernel": jnp.asarray(rng.normal(size=(54, CLASSES)) / 5)},
    }
    shape = (6, 6, 2)

    def apply_fn(p, x):
        h = jax.lax.conv_general_dilated(
            x, p["first"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(h + p["first"]["bias"])
        h = jax.lax.reduce_window(h, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return h.reshape(h.shape[0], -1) @ p["last"]["kernel"]

    def forward(w, x, act, pool):
        h = act(conv(x, w["first/kernel"]) + w["first/bias"])
        h = pool(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return h.flatten(1) @ w["last/kernel"]

    def network(w, x):
        return forward(w, x, torch.relu, lambda h: F.max_pool2d(h, 2))

    def paths(w, z, q, pool):
        pools = {"max": lambda h: F.max_pool2d(h, 2), "sum": lambda h: 4 * F.avg_pool2d(h, 2)}
        return forward(w, z, lambda h: h, pools[pool])

    return Case(apply_fn, params, network, paths, shape)


def drawn(variables, seed):
    """Draw weights of both signs, biases, and averages that are those of no fresh network: zeros hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        match path[-1].key:
            case "kernel":
                return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            case "scale":
                return rng.choice([-1.0, 1.0], leaf.shape) + 0.2 * noise
            case "var":
                return rng.uniform(0.5, 2.0, leaf.shape)
        return 0.2 * noise

    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(draw(path, leaf)), variables)


CASES = {"fc": fc_case, "resnet20": resnet20_case, "pooled": pooled_case}
BUILT: dict[str, Case] = {}


@pytest.fixture(params=["fc", "pooled", pytest.param("resnet20", marks=pytest.mark.slow)])
def case(request):
    if request.param not in BUILT:
        BUILT[request.param] = CASES[request.param]()
    return BUILT[request.param]


def tensors(params, requires_grad=True):
    leaves = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    return {name: torch.tensor(np.asarray(leaf), requires_grad=requires_grad) for name, leaf in leaves}


def batch(case):
    rng = np.random.default_rng(5)
    return rng.normal(size=(BATCH, *case.shape)), rng.integers(0, CLASSES, BATCH)


def losses(case, temperature=1.0):
    x, y = batch(case)

    def loss(params):
        logits = case.apply_fn(params, jnp.asarray(x)) / temperature
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(y)[:, None], 1).mean()

    def torch_loss(weights):
        return F.cross_entropy(case.torch_network(weights, torch.tensor(x)) / temperature, torch.tensor(y))

    return loss, torch_loss


def torch_synflow(case, params, z, objective, power, pool):
    """|θ|^power ∘ ∂R_objective/∂|θ|^objective: weights replaced, one forward pass, one backward pass."""
    weights = {name: (w.abs() ** objective).requires_grad_() for name, w in tensors(params, False).items()}
    case.torch_paths(weights, torch.tensor(z), objective, pool).sum().backward()
    return {
        name: np.abs(leaf) ** power * weights[name].grad.numpy()
        for name, leaf in zip(leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True)
    }


def assert_scores_agree(got, want, names=None):
    """Relative agreement, entry by entry, with room for cancellation at the scale of the leaf's rounding."""
    compared = 0
    for name, leaf in zip(leaf_names(got), jax.tree.leaves(got), strict=True):
        if names is None or name in names:
            scale = np.abs(want[name]).max()
            assert scale > 0, f"{name} scores nothing: the comparison would be empty"
            np.testing.assert_allclose(np.asarray(leaf), want[name], rtol=1e-8, atol=1e-12 * scale, err_msg=name)
            compared += 1
    assert compared > 0


def prunable_names(params):
    return [name for name, c in zip(leaf_names(params), jax.tree.leaves(select(kernels, params)), strict=True) if c]


def test_the_networks_are_the_same_function(case):
    x, _ = batch(case)
    got = np.asarray(case.apply_fn(case.params, jnp.asarray(x)))
    want = case.torch_network(tensors(case.params, False), torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
    assert np.ptp(got, axis=0).min() > 1e-3


def test_snip_agrees(case):
    loss, torch_loss = losses(case)
    weights = tensors(case.params)
    torch_loss(weights).backward()
    want = {name: (w * w.grad).abs().detach().numpy() for name, w in weights.items()}
    assert_scores_agree(jax.jit(lambda p: snip(loss, p))(case.params), want)


def test_grasp_agrees(case):
    """The published code: g · stop(g) differentiated once more, over the prunable weights."""
    names = prunable_names(case.params)
    jitted = jax.jit(lambda p, temperature: grasp(losses(case, temperature)[0], p))
    for temperature in (1.0, 200.0):
        weights = tensors(case.params)
        chosen = [weights[name] for name in names]
        loss = losses(case, temperature)[1](weights)
        gradient = torch.autograd.grad(loss, chosen, create_graph=True)
        inner = sum((g * g.detach()).sum() for g in gradient)
        product = torch.autograd.grad(inner, chosen)
        want = {name: (w * h).detach().numpy() for name, w, h in zip(names, chosen, product, strict=True)}
        assert all((leaf < 0).any() and (leaf > 0).any() for leaf in want.values())
        scores = jitted(case.params, temperature)
        assert_scores_agree(scores, want, names)
        for name, leaf in zip(leaf_names(scores), jax.tree.leaves(scores), strict=True):
            assert name in names or not np.asarray(leaf).any()


VARIANTS = {"synflow": (1, 1), "paper": (2, 1), "conserved": (2, 2), "released": (1, 2)}  # objective, power


def score(case, params, z, variant, pool="sum"):
    if variant == "synflow":
        return synflow(case.apply_fn, params, z, pool=pool)
    return synflow_l2(case.apply_fn, params, z, variant=variant, pool=pool)


def test_synflow_and_its_variants_agree(case):
    """Without data and with the mean of the inputs, and where it matters for both kinds of pooling."""
    pools = ["sum", "max"] if case is BUILT.get("pooled") else ["sum"]
    rng = np.random.default_rng(6)
    for pool in pools:
        jitted = jax.jit(lambda p, z, pool=pool: {v: score(case, p, z, v, pool) for v in VARIANTS})
        for z in (np.ones((1, *case.shape)), np.abs(rng.normal(size=(1, *case.shape)))):
            got = jitted(case.params, jnp.asarray(z))
            for variant, (objective, power) in VARIANTS.items():
                assert_scores_agree(got[variant], torch_synflow(case, case.params, z, objective, power, pool))


def torch_prune(scores_of, params, density, steps):
    """Prune by sorting, and note how close each weight ever came to the threshold, relative to it."""
    names = prunable_names(params)
    values = dict(zip(leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True))
    sizes = [values[name].size for name in names]
    alive = np.ones(sum(sizes), bool)
    margin = np.full(alive.shape, np.inf)
    for step in range(1, steps + 1):
        cut = dict(zip(names, np.split(alive, np.cumsum(sizes)[:-1]), strict=True))
        masked = {name: v * cut[name].reshape(v.shape) if name in cut else v for name, v in values.items()}
        tree = jax.tree.unflatten(jax.tree.structure(params), list(masked.values()))
        scores = scores_of(tree)
        flat = np.concatenate([scores[name].ravel() for name in names])
        live = np.flatnonzero(alive)
        order = live[np.argsort(-flat[live], kind="stable")]
        keep = round(density ** (step / steps) * alive.size)
        margin[live] = np.minimum(margin[live], np.abs(flat[live] / flat[order[keep - 1]] - 1))
        alive = np.zeros_like(alive)
        alive[order[:keep]] = True
    return alive, margin


@pytest.mark.filterwarnings("ignore::pkjax.pruning.result.EmptiedLayerWarning")
@pytest.mark.parametrize(
    ("case", "variant"),
    [("fc", v) for v in VARIANTS]
    + [("pooled", v) for v in VARIANTS]
    + [pytest.param("resnet20", v, marks=pytest.mark.slow) for v in ("synflow", "paper")],
    indirect=["case"],
)
def test_masks_of_100_steps_differ_only_where_scores_tie_to_rounding(case, variant):
    z, density, steps = np.ones((1, *case.shape)), 10**-1.5, 100
    want, margin = torch_prune(
        lambda p: torch_synflow(case, p, z, *VARIANTS[variant], "sum"), case.params, density, steps
    )
    result = prune(lambda p: score(case, p, jnp.asarray(z), variant), case.params, density=density, steps=steps)
    chosen = jax.tree.leaves(select(kernels, case.params))
    got = np.concatenate(
        [np.asarray(m).ravel() for m, c in zip(jax.tree.leaves(result.masks), chosen, strict=True) if c]
    )
    assert got.sum() == want.sum() == round(density * got.size)
    assert (margin[got != want] < 1e-9).all()
    assert (got != want).sum() <= 4, "ties to rounding are rare among random weights"
