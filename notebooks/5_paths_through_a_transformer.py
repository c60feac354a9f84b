# %% [markdown]
# # Paths through a transformer
#
# A transformer is not a sum over paths with gates of 0 and 1: attention multiplies two signals, LayerNorm divides by
# one, GELU is smooth. With frozen gates it is one all the same, at the price of coefficients that depend on the input.
# This notebook follows the paths of a small Vision Transformer: how many there are, which layers they lead through,
# what four methods of pruning leave of them, and how such networks train.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
import pkjax as pk
from flax import nnx

print(f"JAX {jax.__version__} runs on {jax.default_backend().upper()}: {jax.devices()[0].device_kind}")

# %% [markdown]
# The size of the network, and the compression ρ of the masks: a fraction $10^{-\rho}$ of the weights on paths is kept.

# %% tags=["parameters"]
WIDTH, DEPTH, HEADS = 48, 3, 3
COMPRESSION = 1.0
STEPS = 100                     # of SynFlow

# %%
digits = pk.data.load("digits", samples=100)
X, y = jnp.asarray(digits.images), jnp.asarray(digits.labels)
model = pk.models.vit_tiny(10, image=8, channels=1, patch=2, depth=DEPTH, width=WIDTH, heads=HEADS, rngs=nnx.Rngs(0))
apply_fn, params = pk.from_nnx(model)
ones = pk.ones_input(X.shape[1:])
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters; the 16 patches of 2 × 2 pixels of an image "
      "are 16 tokens, and a class token is the 17th")

# %% [markdown]
# ## Coefficients
#
# `pk.paths.frozen` holds at its values for a reference input whatever is not linear in the signal: the probabilities of
# attention, the factor $1/\sigma$ of LayerNorm, the factor $\Phi(z)$ of GELU, $z\,\Phi(z)$. What is left has paths. At
# the reference it is the network itself, exactly. Elsewhere it is not:

# %%
linear = pk.paths.frozen(apply_fn, params, X[:1])
for name, image in {"the reference": X[:1], "another image": X[1:2]}.items():
    real, held = apply_fn(params, image), linear(params, image)
    print(f"{name}: outputs differ by {float(jnp.linalg.norm(real - held) / jnp.linalg.norm(real)):.0e} of their norm")
log10_paths = float(pk.paths.log_count(apply_fn, params, ones, gates="frozen"))
print(f"10^{log10_paths:.1f} paths")

# %% [markdown]
# Queries and keys only make coefficients. They lie on no path, and `pk.on_paths` leaves them out:

# %%
on = pk.on_paths(apply_fn, params, ones, gates="frozen")


def named(choice):
    """The leaves of a choice by their names, as pkjax writes them."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(choice)}


absent = [name for name, chosen in named(on).items() if name.endswith("kernel") and not chosen]
print("on no path:", *(name for name in absent if name.startswith("blocks/0")), sep="\n  ")

# %% [markdown]
# ## Which layers the paths lead through
#
# $R_1 = \sum_p |c_p v_p a_p|$ adds up what all paths carry, and `pk.connectivity` says what share of it flows through
# each kernel. In a chain of layers all of the flow passes every layer. A path of a residual network takes a branch or
# stays in the stream, so the shares of branches are below 100 % and do not add up to it. What starts at pixels enters
# by the patches' kernel; the rest starts at positions, the class token and biases.

# %%
parts = {"attention": ("value", "out"), "mlp": ("up", "down")}
order = ["patches/conv", *(f"blocks/{i}/{part}/{name}" for i in range(DEPTH) for part, names in parts.items()
                           for name in names), "head"]          # as the signal meets them


def flows(masks=None):
    """The share of R₁ through each kernel, in the order of the signal."""
    links = pk.connectivity(apply_fn, params, ones, masks=masks, prunable=on, gates="frozen")
    shares = {layer.name.removesuffix("/kernel"): layer.flow for layer in links.layers}
    return np.array([shares[name] for name in order]), links.log10_paths


def draw(ax, shares):
    """A bar for each kernel: what it carries."""
    colours = [pk.plots.BLUE if "attention" in name else pk.plots.ORANGE if "mlp" in name else pk.plots.BLACK
               for name in order]
    ax.bar(range(len(order)), 100 * shares, color=colours, width=0.8)
    ax.set_xticks(range(len(order)), [name.split("/")[-1].replace("conv", "patches") for name in order], rotation=90)
    for i in range(DEPTH):
        ax.axvline(4 * i + 0.5, color="#9A9A9A", linewidth=0.8, linestyle=":")
        ax.text(4 * i + 2.5, 104, f"block {i}", ha="center", fontsize=9)
    ax.axvline(4 * DEPTH + 0.5, color="#9A9A9A", linewidth=0.8, linestyle=":")
    ax.set(ylim=(0, 112), ylabel="share of $R_1$ in %")


dense_flow, _ = flows()
figure, ax = plt.subplots(figsize=(9, 3.4), dpi=110, layout="constrained")
draw(ax, dense_flow)
for colour, label in ((pk.plots.BLUE, "attention"), (pk.plots.ORANGE, "MLP")):
    ax.bar(0, 0, color=colour, label=label)
ax.legend(fontsize=9, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.17));

# %% [markdown]
# The two kernels of a branch carry the same, which is the conservation that SynFlow rests on.
#
# ## Four masks
#
# SynFlow, magnitude, random and SNIP, each on the same leaves, those on paths. SynFlow freezes the coefficients anew in
# every step, at the weights that are left.

# %%
def loss(p):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, X), y).mean()


methods = {"random": (lambda p: pk.random(p, key=jax.random.key(1)), 1), "magnitude": (pk.magnitude, 1),
           "SNIP": (lambda p: pk.snip(loss, p), 1),
           "SynFlow": (lambda p: pk.synflow(apply_fn, p, ones, gates="frozen"), STEPS)}
pruned, left = {}, {}
for name, (score, steps) in methods.items():
    pruned[name] = pk.prune(score, params, compression=COMPRESSION, steps=steps, prunable=on)
    left[name] = flows(pruned[name].masks)
    print(f"{name:10}{pruned[name].kept:6,} of {pruned[name].total:,} weights, 10^{left[name][1]:.1f} paths")

# %% [markdown]
# What they keep of each kernel, in the order of the signal, and what flows through what is left:

# %%
kept = {name: {layer.name.removesuffix("/kernel"): layer.kept / layer.total for layer in result.layers}
        for name, result in pruned.items()}
figure, axes = plt.subplots(2, 1, figsize=(9, 5), dpi=110, layout="constrained")
titles = ("share of its weights that each kernel keeps, in %", "share of $R_1$ that flows through what is left, in %")
tables = (np.array([[kept[name][layer] for layer in order] for name in methods]),
          np.array([left[name][0] for name in methods]))
for ax, title, shares in zip(axes, titles, tables, strict=True):
    ax.imshow(100 * shares, cmap="cividis", aspect="auto", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                color="black" if share > 0.5 else "white")
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_yticks(range(len(methods)), methods)
    ax.set_xticks(range(len(order)), [] if ax is axes[0] else [
        "/".join(name.removeprefix("blocks/").split("/")[::2]) if "/" in name and "conv" not in name
        else name.split("/")[0] for name in order], rotation=90)
    for i in range(DEPTH + 1):
        ax.axvline(4 * i + 0.5, color="white", linewidth=2)

# %% [markdown]
# All kernels of a ViT start with the same standard deviation, so magnitude keeps about as much of each as chance does.
# SynFlow keeps more where the same flow passes through fewer weights: of attention, whose kernels are a quarter as
# large as those of the MLP, and of both ends. Of the four, its flow comes closest to that of the dense network; the
# other masks shift it to the MLPs and away from the pixels.
#
# ## How they train
#
# A larger ViT (six blocks of width 96, patches of 8 × 8 pixels) on CIFAR-10, as small as two cores ask for: 5000
# training images, four epochs, 2000 test images, two seeds. `pkjax sweep benchmarks/sweeps/vit.toml` makes the table.

# %%
files = [folder / "benchmarks" / "results" / "vit.parquet" for folder in (Path.cwd(), Path.cwd().parent)]
file = next((file for file in files if file.exists()), None)
if file is None:
    raise SystemExit("benchmarks/results/vit.parquet is in the repository: start the notebook there")
runs = pd.read_parquet(file)
for (pruner, compression), group in runs.groupby(["pruner", "compression"]):
    print(f"{pruner:10} compression {compression:g}:", ", ".join(f"{share:.1%}" for share in group["test_accuracy"]))

# %%
figure, ax = plt.subplots(figsize=(5.2, 3.4), dpi=110, layout="constrained")
pk.experiments.figures.figure3(runs.replace({"model": {name: "ViT 96×6" for name in runs["model"]}}), axes=[ax]);

# %% [markdown]
# The test images alone leave a standard error of one point, and seeds differ by more. So the order at 0.5 and 1 says
# nothing. At 2, random and magnitude hardly learn in four epochs, and SynFlow is ahead of SNIP with both seeds.
# That pruned networks are ahead of the dense one says that they learn faster at first, not that they end higher: none
# has finished training.
