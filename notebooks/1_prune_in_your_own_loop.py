# %% [markdown]
# # Prune in your own training loop
#
# pkjax does not want to own your training loop. A pruner is a function from parameters to scores, `pk.prune` turns
# scores into **masks**, a pytree of booleans like the parameters, and two functions make any loop train what is left:
# `pk.apply_masks(params, masks)` sets pruned weights to 0 once, and `pk.masked(optimizer, masks)` wraps an optax
# optimizer so that they stay there. This notebook does so with Flax Linen, Flax NNX and plain JAX, and compares six
# pruners on real images.

# %%
# Installs pkjax on Colab. Before pkjax is on PyPI, upload the repository as an archive, pkjax.zip or pkjax-main.zip, to
# Colab's files (the folder symbol on the left) first.
import subprocess
import sys
from pathlib import Path

try:
    import google.colab  # noqa: F401
except ImportError:
    pass
else:
    archives = sorted(Path.cwd().glob("pkjax*.zip"), key=lambda file: file.stat().st_mtime)
    source = f"pkjax[data,plots] @ {archives[-1].as_uri()}" if archives else "pkjax[data,plots]"
    print("pip install", source)
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=False).returncode:
        raise SystemExit("This failed. If pkjax is not on PyPI yet, upload the repository as an archive pkjax.zip to "
                         "Colab's files and run this cell again.")

# %%
import tempfile
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pkjax as pk
from flax import nnx
from matplotlib.ticker import PercentFormatter

print(f"JAX {jax.__version__} runs on {jax.default_backend().upper()}: {jax.devices()[0].device_kind}")

# %% [markdown]
# Sizes, to be changed at will: units in a hidden layer, steps of training, seeds, and the compressions ρ to compare
# (a fraction $10^{-\rho}$ of the weights is kept).

# %% tags=["parameters"]
WIDTH = 100
STEPS = 400
SEEDS = 3
COMPRESSIONS = [1.0, 1.5, 2.0, 2.5]

# %% [markdown]
# The data are scikit-learn's digits, 8 × 8 pixels. A step takes a random batch of them.

# %%
train, test = pk.data.load("digits"), pk.data.load("digits", split="test")
X, y = jnp.asarray(train.images), jnp.asarray(train.labels)
X_test, y_test = jnp.asarray(test.images), jnp.asarray(test.labels)
print(f"{len(train)} images to train on, {len(test)} to test")


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy_of(logits, labels):
    return float((logits.argmax(axis=1) == labels).mean())


def batch_of(key, size=64):
    rows = jax.random.randint(key, (size,), 0, len(X))
    return X[rows], y[rows]


# %% [markdown]
# ## Flax Linen
#
# Your module, as it is. `pk.from_linen` gives the pair `(apply_fn, params)` that every function of pkjax takes. SynFlow
# needs no data but an input of ones; it prunes in a hundred small steps, to a tenth of the weights here.


# %%
class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width // 5, (3, 3), strides=2)(x)
        x = nn.relu(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


module = Network(WIDTH)
apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), X[:1]))
ones = pk.ones_input(X.shape[1:])

pruned = pk.prune(lambda p: pk.synflow(apply_fn, p, ones), params, compression=1, steps=100)
for layer in pruned.layers:
    print(f"{layer.name:16}{layer.kept:6} of {layer.total:6} weights")
print(f"{'together':16}{pruned.kept:6} of {pruned.total:6}")

# %% [markdown]
# Now the loop. Only the two marked lines know of pruning.

# %%
optimizer = pk.masked(optax.adamw(0.003), pruned.masks)        # ← pruned weights stay 0
theta = pk.apply_masks(params, pruned.masks)                   # ← and are 0 from the beginning
state = optimizer.init(theta)


@jax.jit
def step(theta, state, key):
    images, labels = batch_of(key)
    loss, slope = jax.value_and_grad(lambda p: loss_of(module.apply({"params": p}, images), labels))(theta)
    updates, state = optimizer.update(slope, state, theta)
    return optax.apply_updates(theta, updates), state, loss


for i in range(STEPS):
    theta, state, loss = step(theta, state, jax.random.key(i))
    if (i + 1) % (STEPS // 4) == 0:
        print(f"step {i + 1:4}: loss {float(loss):.3f}, test accuracy "
              f"{accuracy_of(apply_fn(theta, X_test), y_test):.1%}")

# %% [markdown]
# What is pruned is exactly 0, in the parameters and in the optimizer's state, which therefore saves and loads like
# that of the bare optimizer.

# %%
moments = state[0].mu
for name, tree in {"weights": theta, "Adam's momenta": moments}.items():
    nonzero = sum(int((layer["kernel"] != 0).sum()) for layer in tree.values())
    print(f"{name}: {nonzero} of the kernels' are not 0, the masks keep {pruned.kept}")

# %% [markdown]
# ## Save and load masks
#
# One bit a weight, no pickle, and a file that belongs to another network is refused by name.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "masks.npz"
    pk.save_masks(file, pruned.masks)
    loaded = pk.load_masks(file, like=params)
    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, pruned.masks)))
    print(f"{file.stat().st_size:,} bytes for {pruned.total:,} weights; "
          f"{'the same masks' if same else 'NOT the same masks'} come back")
    try:
        pk.load_masks(file, like={"Dense_0": params["Dense_0"]})
    except ValueError as error:
        print(str(error).replace(str(file), file.name))

# %% [markdown]
# ## Flax NNX
#
# The same with an NNX model: masks fit the model's own parameters, and `nnx.Optimizer` takes the wrapped optimizer.
# SNIP scores by the loss of one batch.

# %%
model = pk.models.nnx_fc(64, WIDTH, depth=2, rngs=nnx.Rngs(0))
nnx_apply, nnx_params = pk.from_nnx(model)
images, labels = batch_of(jax.random.key(0), 256)

nnx_pruned = pk.prune(lambda p: pk.snip(lambda p: loss_of(nnx_apply(p, images), labels), p), nnx_params, compression=1)
nnx.update(model, pk.apply_masks(nnx_params, nnx_pruned.masks))
nnx_optimizer = nnx.Optimizer(model, pk.masked(optax.adamw(0.003), nnx_pruned.masks), wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, key):
    images, labels = batch_of(key)
    optimizer.update(model, nnx.grad(lambda model: loss_of(model(images), labels))(model))


for i in range(STEPS):
    nnx_step(model, nnx_optimizer, jax.random.key(i))
nnx_kept = sum(int((layer.kernel[...] != 0).sum()) for layer in model.layers)
print(f"test accuracy {accuracy_of(model(X_test), y_test):.1%} with {nnx_kept} of {nnx_pruned.total} weights")

# %% [markdown]
# ## Plain JAX
#
# No Flax at all: a function, and any pytree. What `pk.prune` prunes are by default the floating leaves of two or more
# axes; a `prunable` predicate of your own chooses otherwise. Here the last layer is left whole.


# %%
def plain(params, x):
    x = x.reshape(len(x), -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def draw(key, sizes=(64, WIDTH, WIDTH, 10)):
    return [{"w": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
            for k, n, m in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)]


def but_the_last(path, leaf):
    return pk.kernels(path, leaf) and path[0].idx < 2


whole = draw(jax.random.key(0))
kept_last = pk.prune(lambda p: pk.synflow_l2(plain, p, ones), whole, compression=1, steps=100, prunable=but_the_last)
print([f"{layer.name}: {layer.kept} of {layer.total}" for layer in kept_last.layers])
print("all of the last layer is kept:", bool(kept_last.masks[2]["w"].all()))

# %% [markdown]
# One compiled function trains the networks of all seeds side by side. Masks are data to it, so that other masks need no
# new compilation.


# %%
@jax.jit
@jax.vmap
def fit(params, masks, key):
    optimizer, theta = pk.masked(optax.adam(0.003), masks), pk.apply_masks(params, masks)

    def step(carry, key):
        theta, state = carry
        images, labels = batch_of(key)
        loss, slope = jax.value_and_grad(lambda p: loss_of(plain(p, images), labels))(theta)
        updates, state = optimizer.update(slope, state, theta)
        return (optax.apply_updates(theta, updates), state), loss

    (theta, _), losses = jax.lax.scan(step, (theta, optimizer.init(theta)), jax.random.split(key, STEPS))
    right = plain(theta, X_test).argmax(axis=1) == y_test
    return right.mean(), losses


# %% [markdown]
# ## One shot or many
#
# How often a pruner looks at what is left can matter more than which one it is. SynFlow in one shot cuts whole layers
# off; in a hundred steps it keeps every layer connected. At $\rho = 2$ (paths that start at a bias are counted too):


# %%
def synflow(params):
    return pk.synflow(plain, params, ones)


start = draw(jax.random.key(0))
counts, layers_kept = {}, {}
for steps in (1, 10, 100):
    with warnings.catch_warnings():         # pkjax warns where a layer is emptied or the network cut: that is the point
        warnings.simplefilter("ignore", pk.EmptiedLayerWarning)
        warnings.simplefilter("ignore", pk.DisconnectedWarning)
        sparse = pk.prune(synflow, start, compression=2, steps=steps)
        links = pk.connectivity(plain, start, ones, masks=sparse.masks)
    counts[steps], layers_kept[steps] = sparse.kept, [layer.density for layer in sparse.layers]
    print(f"{steps:3} step{'s' if steps > 1 else ' '}: {sparse.kept} weights, in the layers "
          f"{[layer.kept for layer in sparse.layers]}, {10**links.log10_paths:,.0f} paths left, "
          f"{'connected' if links.connected else 'input and output cut apart'}")

# %% [markdown]
# ## Six pruners
#
# Each prunes the same initialisations to the same numbers of weights, and each result is trained alike. Random and
# magnitude pruning are the baselines that everything else should beat.

# %%
images, labels = batch_of(jax.random.key(1000), 256)


def loss(params, temperature=1.0):
    return loss_of(plain(params, images) / temperature, labels)


PRUNERS = {                                     # scores, and in how many steps
    "random": (lambda p: pk.random(p, key=jax.random.key(0)), 1),
    "magnitude": (pk.magnitude, 1),
    "SNIP": (lambda p: pk.snip(loss, p), 1),
    "GraSP": (lambda p: pk.grasp(partial(loss, temperature=200.0), p), 1),
    "SynFlow": (synflow, 100),
    "SynFlow-L2": (lambda p: pk.synflow_l2(plain, p, ones), 100),
}
inits = [draw(jax.random.key(seed)) for seed in range(SEEDS)]
keys = jax.random.split(jax.random.key(7), SEEDS)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), inits[0])
dense, dense_losses = fit(stack(inits), stack([everything] * SEEDS), keys)
accuracies, kept = {}, {}
for name, (score_fn, steps) in PRUNERS.items():
    for rho in COMPRESSIONS:
        results = [pk.prune(score_fn, init, compression=rho, steps=steps, min_per_layer=1) for init in inits]
        kept[name, rho] = [result.kept for result in results]
        accuracies[name, rho] = np.asarray(fit(stack(inits), stack([result.masks for result in results]), keys)[0])
    print(f"{name:11}", "  ".join(f"ρ = {rho}: {accuracies[name, rho].mean():.1%}" for rho in COMPRESSIONS))
print(f"{'dense':11} {float(dense.mean()):.1%}")

# %% [markdown]
# The picture: on the left the test accuracy as weights go (mean over seeds, bars from the worst to the best), on the
# right what one shot does to the layers.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained", width_ratios=[3, 2])
looks = {"random": ("#8C8C8C", "X", ":"), "magnitude": (pk.plots.BLACK, "^", "--"), "SNIP": (pk.plots.GREEN, "v", "-."),
         "GraSP": ("#CC79A7", "P", "--"), "SynFlow": (pk.plots.BLUE, "o", "-"),
         "SynFlow-L2": (pk.plots.VERMILLION, "s", "-")}
for place, (name, (colour, marker, dashes)) in enumerate(looks.items()):
    rates = 100 * np.array([accuracies[name, rho] for rho in COMPRESSIONS])
    middle = rates.mean(axis=1)
    left.errorbar(np.array(COMPRESSIONS) + 0.012 * (place - 2.5), middle,
                  [middle - rates.min(axis=1), rates.max(axis=1) - middle], color=colour, marker=marker,
                  linestyle=dashes, label=name, capsize=2, linewidth=1.5)
left.axhline(100 * float(dense.mean()), color=pk.plots.BLACK, linewidth=1, label="dense")
left.set(xlabel="compression ρ (a fraction $10^{-ρ}$ is kept)", ylabel="test accuracy in %",
         title="Digits, trained alike")
left.legend(fontsize=9, frameon=False)
left.grid(linewidth=0.4, alpha=0.5)

for place, (steps, densities) in enumerate(layers_kept.items()):
    right.bar(np.arange(3) + 0.27 * (place - 1), densities, 0.25, hatch=["", "//", ".."][place], edgecolor="white",
              color=[pk.plots.ORANGE, pk.plots.GREEN, pk.plots.BLUE][place], label=f"{steps} step{'s' * (steps > 1)}")
    for layer, density in enumerate(densities):
        right.text(layer + 0.27 * (place - 1), density, f"{density:.1%}", ha="center", va="bottom", fontsize=8)
right.set_xticks(range(3), ["first", "second", "last"])
right.set(xlabel="layer", ylabel="share of its weights kept", title="SynFlow at ρ = 2")
right.yaxis.set_major_formatter(PercentFormatter(1))
right.legend(fontsize=9, frameon=False);

# %% [markdown]
# For training as the paper does it, with BatchNorm, augmentation and checkpoints, there is `pk.training.fit`; for whole
# grids of such runs, `pkjax sweep`.
