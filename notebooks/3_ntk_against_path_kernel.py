# %% [markdown]
# # The NTK against the path kernel, on images
#
# The tangent kernel of a ReLU network factorises, $\Theta = J_v^f\, \Pi\, {J_v^f}^{\top}$, into what the data do (which
# paths they open, and how strongly: $J_v^f$) and what the architecture does (the path kernel $\Pi$). Pruning at
# initialisation looks at $\Pi$ alone. How much of $\Theta$ does it see? This notebook asks scikit-learn's digits: the
# three spectra and their bounds, dense and pruned to a tenth of the weights; which eigenvectors carry the kernel; and
# whether $\operatorname{Tr} \Pi$ tells anything about the spectrum of $\Theta$ on real images.
#
# (What paths, $\Pi$ and $J_v^f$ are is in `2_what_a_path_kernel_is`.)

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
import pkjax as pk
from matplotlib.colors import LogNorm

jax.config.update("jax_default_matmul_precision", "highest")     # spectra need every digit that the device has
print(f"JAX {jax.__version__} runs on {jax.default_backend().upper()}: {jax.devices()[0].device_kind}")

# %% [markdown]
# The network and the batch, and for the last section how many random initialisations and which compressions.

# %% tags=["parameters"]
WIDTH, DEPTH = 64, 4
SAMPLES = 24
SEEDS = 4
COMPRESSIONS = [0.5, 1.0, 1.5]

# %%
digits = pk.data.load("digits", samples=SAMPLES)
X, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
module = pk.models.fc(width=WIDTH, depth=DEPTH)
apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), X))
ones = pk.ones_input(X.shape[1:])

figure, axes = plt.subplots(1, min(12, SAMPLES), figsize=(11, 1.2), dpi=110, layout="constrained")
for ax, image, label in zip(axes, digits.raw, digits.labels, strict=False):
    ax.imshow(image[..., 0], cmap="gray_r")
    ax.set_title(int(label), fontsize=9)
    ax.set_axis_off()

# %% [markdown]
# ## Dense and pruned
#
# SynFlow-L2 scores a weight by the squared values of the paths through it: it keeps what gives $\Pi$ its trace. It
# never sees an image.

# %%
def synflow_l2(p):
    return pk.synflow_l2(apply_fn, p, ones)


pruned = pk.prune(synflow_l2, params, compression=1, steps=100)
print(f"{pruned.kept} of {pruned.total} weights kept")

reports = {name: pk.analyze(apply_fn, params, X, masks=masks)
           for name, masks in {"dense": None, "pruned": pruned.masks}.items()}

print(f"\n{'':24}{'dense':>12}{'pruned':>12}")
for text, value in {"paths": lambda r: f"10^{r.log10_paths:.1f}", "Tr Θ": lambda r: f"{r.trace_ntk:.4g}",
                    "Tr Π": lambda r: f"{r.trace_pi:.4g}", "λ₁ of Θ": lambda r: f"{r.lam[0]:.4g}",
                    "bound ν₁ π₁": lambda r: f"{r.nu[0] * r.pi[0]:.4g}",
                    "effective rank of Π": lambda r: f"{r.effective_rank:.0f}",
                    "Tr Θ seen by top of Π": lambda r: f"{r.captured:.1%}"}.items():
    print(f"{text:24}{value(reports['dense']):>12}{value(reports['pruned']):>12}")

# %% [markdown]
# The spectra. $\nu_i \pi_i$ bounds sums and products of the $\lambda_i$; the gap is what the eigenvectors of data and
# architecture miss each other by.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=110, sharey=True, layout="constrained")
for ax, (name, report) in zip(axes, reports.items(), strict=True):
    pk.plots.spectra(report, ax)
    ax.set_title(f"Eigenvalues, {name}", fontsize=11, loc="left")

# %% [markdown]
# Every inequality of Theorem 1, and by what factor the bounded quantity stays below its bound where that is tightest.
# The claims that are no theorems may fail; the theorems may not. Here everything holds, and by factors of thousands and
# millions: as estimates of $\lambda_i$ the bounds say next to nothing.

# %%
print(f"{'dense':>17}{'pruned':>19}")
for name, claim in reports["dense"].claims.items():
    row = [reports[which].claims[name] for which in reports]
    cells = "".join(f"{'holds' if c.holds else 'FAILS':>7} by {1 / (1 - c.slack):<8.3g} " for c in row)
    print(f"{cells}{'theorem' if claim.proven else 'claim':8} {claim.text}")

# %% [markdown]
# ## Who carries the kernel?
#
# $\operatorname{Tr} \Theta = \sum_{ij} \nu_i \pi_j O_{ij}^2$ splits the trace among pairs: the $i$-th direction of the
# data, the $j$-th of the architecture. On the side of the data the first ten directions stand out, one for each output:
# digits resemble each other. On the side of the architecture nothing does: the spectrum of $\Pi$ is flat, its effective
# rank is in the thousands, and its top eigenvectors carry a small part of $\Theta$.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained")
for ax, (name, report) in zip(axes, reports.items(), strict=True):
    pk.plots.overlaps(report, ax)
    parts = report.nu[:, None] * report.pi * report.overlaps**2 / report.trace_ntk
    print(f"{name}: {report.pi.size} of {report.parameters} eigenvectors of Π carry {report.captured:.1%} of Tr Θ, "
          f"{parts[:10].sum():.1%} in the first ten directions of the data")
    ax.set_title(f"{name}: {report.captured:.0%} of Tr Θ", fontsize=11, loc="left")

# %% [markdown]
# ## The trace of Π against the whole spectrum of Θ
#
# The hope behind path-kernel pruning is that $\operatorname{Tr} \Pi$, which needs no data, stands for $\Theta$. So take
# many networks, dense and pruned in four ways, and look at all eigenvalues of their $\Theta$ on the same images. Beside
# $\operatorname{Tr} \Pi$ there is the **gated path trace**, the part of $\operatorname{Tr} \Theta$ on the diagonal of
# $\Pi$: it knows the data's gates and costs one backward pass an image.


# %%
@jax.jit
def measure(params, masks):
    theta = pk.ntk(apply_fn, params, X, masks=masks)
    rows = theta.shape[0] * theta.shape[2]
    return (theta.transpose(0, 2, 1, 3).reshape(rows, rows), pk.path_kernel.trace(apply_fn, params, ones, masks=masks),
            pk.path_kernel.gated_trace(apply_fn, params, X, masks=masks))


def random(p):
    return pk.random(p, key=jax.random.key(0))


def loss(p):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, X), labels).mean()


def snip(p):
    return pk.snip(loss, p)


pruners = {"random": (random, 1), "magnitude": (pk.magnitude, 1), "SNIP": (snip, 1), "SynFlow-L2": (synflow_l2, 100)}
networks = []
for seed in range(SEEDS):
    theta0 = pk.from_linen(module, module.init(jax.random.key(seed), X))[1]
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), theta0)
    masks = {("dense", 0.0): everything} | {
        (name, rho): pk.prune(score_fn, theta0, compression=rho, steps=steps, min_per_layer=10).masks
        for name, (score_fn, steps) in pruners.items() for rho in COMPRESSIONS}
    for (name, rho), mask in masks.items():
        matrix, trace_pi, gated = measure(theta0, mask)
        lam = np.maximum(np.linalg.eigvalsh(np.asarray(matrix, np.float64))[::-1], 0)
        networks.append({"pruner": name, "rho": rho, "lam": lam, "Tr Π": float(trace_pi), "gated trace": float(gated),
                         "Tr Θ": lam.sum()})
print(f"{len(networks)} networks, Tr Π from {min(n['Tr Π'] for n in networks):.2g} "
      f"to {max(n['Tr Π'] for n in networks):.2g}")

# %% [markdown]
# Correlations of logarithms: over all networks, where pruning moves everything by orders of magnitude, and at one
# compression, where it would have to tell similar networks apart.

# %%
def correlation(predictor, group):
    logs = np.log([[network[predictor], network["Tr Θ"]] for network in group])
    return np.corrcoef(logs.T)[0, 1] if len(group) > 2 else np.nan


levels = [0.0, *COMPRESSIONS]
correlations = {predictor: [correlation(predictor, networks)] + [
    correlation(predictor, [network for network in networks if network["rho"] == rho]) for rho in levels]
    for predictor in ("Tr Π", "gated trace")}
print(f"{'correlation with Tr Θ':24}{'all':>8}" + "".join(f"{f'ρ = {rho}':>10}" for rho in levels))
for predictor, values in correlations.items():
    print(f"{predictor:24}{values[0]:8.2f}" + "".join(f"{value:10.2f}" for value in values[1:]))

# %% [markdown]
# The whole spectra, coloured by $\operatorname{Tr} \Pi$, and the two traces against that of $\Theta$:

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=110, layout="constrained", width_ratios=[1.3, 1, 1])
norm = LogNorm(min(n["Tr Π"] for n in networks), max(n["Tr Π"] for n in networks))
colours = plt.get_cmap("cividis")
for network in networks:
    axes[0].plot(np.arange(1, network["lam"].size + 1), np.where(network["lam"] > 1e-7 * network["lam"][0],
                 network["lam"], np.nan), color=colours(norm(network["Tr Π"])), linewidth=1.2)
axes[0].set(xscale="log", yscale="log", xlabel="index $i$", ylabel="$\\lambda_i$", title="All spectra of Θ")
figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes[0], label="Tr Π")

markers = {"dense": "*", "random": "X", "magnitude": "^", "SNIP": "v", "SynFlow-L2": "s"}
tints = {"dense": pk.plots.BLACK, "random": "#8C8C8C", "magnitude": pk.plots.ORANGE, "SNIP": pk.plots.GREEN,
         "SynFlow-L2": pk.plots.VERMILLION}
for ax, (predictor, values) in zip(axes[1:], correlations.items(), strict=True):
    for name, marker in markers.items():
        group = [network for network in networks if network["pruner"] == name]
        ax.plot([n[predictor] for n in group], [n["Tr Θ"] for n in group], marker, color=tints[name], label=name,
                linestyle="none", markersize=6, alpha=0.8)
    ax.set(xscale="log", yscale="log", xlabel=predictor, ylabel="Tr Θ", title=f"r = {values[0]:.2f} over all")
    ax.grid(linewidth=0.4, alpha=0.5)
axes[1].legend(fontsize=8, frameon=False);

# %% [markdown]
# Pruning moves all of it together: networks with a larger $\operatorname{Tr} \Pi$ have a spectrum of $\Theta$ that
# lies higher as a whole, and over orders of magnitude the one forecasts the other. Among networks of *one* compression
# it forecasts less the more is pruned, and among dense ones nothing that a few seeds could show. Nor does it see what
# SNIP does, which looks at the images and keeps ten times the $\operatorname{Tr} \Theta$ that its
# $\operatorname{Tr} \Pi$ suggests. The gated path trace, which looks at the images too, holds on much longer. Whoever
# wants to compare pruners at the same number of weights should use that, or `pk.ntk_trace` itself.
