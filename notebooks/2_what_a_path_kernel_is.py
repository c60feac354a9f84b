# %% [markdown]
# # What a path kernel is
#
# A ReLU network is a sum over paths: from an entry of the input, or from a bias, along one weight in each layer to an
# output,
#
# $$f_k(x, \theta) = \sum_{p \to k} v_p(\theta)\, a_p(x, \theta)\, x_{s(p)} .$$
#
# Here $v_p$ is the product of the weights on the path $p$, the gate $a_p$ is 1 where every unit on it is open for $x$
# and 0 otherwise, and $s(p)$ is the input entry where it starts. This notebook takes a network that is small enough to
# list them all, draws them, builds the path kernel $\Pi$ from them, and finds the tangent kernel $\Theta$ in it. Then
# it does the same without listing a single path, and ends where the theory of pruning at initialisation starts: at
# Theorem 1, what it promises and what it does not.

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
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pkjax as pk
from jax.flatten_util import ravel_pytree

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")     # spectra need every digit that the device has
print(f"JAX {jax.__version__} runs on {jax.default_backend().upper()}: {jax.devices()[0].device_kind}")

# %% [markdown]
# How many random networks the last section draws:

# %% tags=["parameters"]
NETWORKS = 40

# %% [markdown]
# ## A network of eighteen paths
#
# Two inputs, three hidden units with biases, two outputs. Any JAX function does; parameters are any pytree.


# %%
def network(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


params = {
    "first": {"kernel": jnp.array([[1.2, -0.7, 0.5], [-0.6, 0.9, 1.1]]), "bias": jnp.array([0.2, -0.1, -0.4])},
    "second": {"kernel": jnp.array([[0.8, -1.0], [1.3, 0.6], [-0.5, 0.9]])},
}
X = jnp.array([[1.0, 0.5], [-0.4, 1.0], [0.8, -1.0]])
N, K = network(params, X).shape

factors = pk.paths.factorize(network, params, X)
print(f"{len(factors.paths)} paths\n")
for path, value in list(zip(factors.paths, factors.values, strict=True))[:4]:
    start = "a bias" if path.source is None else f"input {path.source + 1}"
    print(f"from {start} by {' and '.join(path.parameters)} to output {path.output + 1}:  v = {value:+.2f}")
print("…")

# %% [markdown]
# The picture shows each path as a line of one colour, its value $v_p$. Paths that share a weight run side by side on
# its edge; those from a bias start at a square.

# %%
figure, ax = plt.subplots(figsize=(6.4, 3.8), dpi=110, layout="constrained")
pk.plots.paths(factors.paths, factors.values, ax=ax);

# %% [markdown]
# ## An input opens some of the paths
#
# The gates of an example choose a part of the network. `factors.jvf` is the matrix $J_v^f$, the derivative of the
# outputs by the path values: its entry in the row $(x, k)$ and the column $p \to k$ is $a_p(x)\, x_{s(p)}$. What is not
# zero there, takes part.

# %%
reach = factors.jvf.reshape(N, K, -1)              # examples, outputs, paths
active = (reach != 0).any(axis=1)

figure, axes = plt.subplots(1, N, figsize=(13, 3.2), dpi=110, layout="constrained")
for example, ax in enumerate(axes):
    pk.plots.paths(factors.paths, factors.values, active[example], ax, limit=float(abs(factors.values).max()))
    ax.set_title(f"x = {X[example].tolist()}: {active[example].sum()} of 18 paths", fontsize=10, loc="left")

# %% [markdown]
# The network is linear in its path values, $f = J_v^f\, v$. Summing the open paths gives its outputs:

# %%
outputs = np.asarray(network(params, X))
path_sum = (factors.jvf @ factors.values).reshape(N, K)
print("network    ", outputs.round(3).tolist())
print("sum of paths", path_sum.round(3).tolist())
print(f"\nlargest difference {abs(outputs - path_sum).max():.1e}")

# %% [markdown]
# ## The path kernel
#
# Paths share weights: moving one weight moves the values of all the paths that run through it. $J_\theta^v$ says by how
# much, with a row for each path and a column for each parameter, and
#
# $$\Pi = J_\theta^v\, {J_\theta^v}^{\!\top}, \qquad
#   \Pi_{pq} = \sum_j \frac{\partial v_p}{\partial \theta_j} \frac{\partial v_q}{\partial \theta_j}$$
#
# is the **path kernel**. It knows the architecture and the weights, and has seen no data. By the chain rule
# $\nabla_\theta f = J_v^f J_\theta^v$, so the tangent kernel factorises into data and architecture:
#
# $$\Theta = \nabla_\theta f\, {\nabla_\theta f}^{\top} = J_v^f\; \Pi\; {J_v^f}^{\top} .$$

# %%
theta = np.asarray(pk.ntk(network, params, X)).transpose(0, 2, 1, 3).reshape(N * K, N * K)
product = factors.jvf @ factors.pi @ factors.jvf.T
print(f"Π is {factors.pi.shape[0]} × {factors.pi.shape[1]}, Θ is {N * K} × {N * K}")
print(f"‖Θ − J Π Jᵀ‖ / ‖Θ‖ = {np.linalg.norm(theta - product) / np.linalg.norm(theta):.1e}")

# %% [markdown]
# The same equation in pictures. Orange is positive, purple is negative, each matrix in its own scale. Rows of $J_v^f$
# belong to examples and outputs: a path has entries for its own output alone, and only where it is open.

# %%
matrices = {"$\\Theta$, tangent kernel": theta, "$J_v^f$, data": factors.jvf, "$\\Pi$, path kernel": factors.pi,
            "${J_v^f}^{\\!\\top}$": factors.jvf.T}
figure, axes = plt.subplots(1, 4, figsize=(13, 5), dpi=110, layout="constrained",
                            width_ratios=[matrix.shape[1] for matrix in matrices.values()])
for ax, (name, matrix), sign in zip(axes, matrices.items(), ["=", "×", "×", ""], strict=True):
    top = abs(matrix).max()
    ax.imshow(matrix, cmap="PuOr_r", vmin=-top, vmax=top)
    ax.set_title(name, fontsize=11)
    ax.set_xlabel("  ×  ".join(map(str, matrix.shape)))
    ax.set(xticks=[], yticks=[])
    ax.text(1.02, 0.5, f" {sign}", transform=ax.transAxes, fontsize=16, va="center")

# %% [markdown]
# ## The same without a path
#
# FC-100 on MNIST has 7.8 · 10¹⁵ paths, and nobody lists those. Two facts make its path kernel a tool. First, $\Pi$ has
# the non-zero eigenvalues of its dual $G = {J_\theta^v}^{\!\top} J_\theta^v$, which has a row for each *parameter*.
# Second, $G$ comes out of the **path polynomial**
#
# $$R(\varphi) = \sum_p \prod_{j \in p} \varphi_j, \qquad
#   G = \operatorname{diag}(\nabla R) + \operatorname{diag}(\theta)\, \nabla^2 R\, \operatorname{diag}(\theta)
#   \quad \text{at } \varphi = \theta^2,$$
#
# and $R$ is one forward pass: square the weights, open all gates, put in ones. `jax.grad` and `jax.hessian` do the
# rest.

# %%
flat, unravel = ravel_pytree(params)
ones = pk.ones_input((2,), flat.dtype)


def R(phi):
    return pk.paths.polynomial(network, unravel(phi), ones, q=1).sum()      # φ = θ² is put in as it is


G = jnp.diag(jax.grad(R)(flat**2)) + jnp.diag(flat) @ jax.hessian(R)(flat**2) @ jnp.diag(flat)
print(f"G is {G.shape[0]} × {G.shape[1]}; from the list of paths it differs by "
      f"{abs(G - factors.jtv.T @ factors.jtv).max():.1e}")

from_paths = np.linalg.eigvalsh(factors.pi)[::-1][:len(flat)]
from_polynomial = np.asarray(pk.path_kernel.eigenvalues(network, params, ones, k=len(flat)))
print(f"eigenvalues of Π, from the list of paths and by pk.path_kernel, differ by "
      f"{abs(from_paths - from_polynomial).max():.1e}")

# %% [markdown]
# The sum of the eigenvalues, $\operatorname{Tr} \Pi = \sum_j \partial R / \partial \varphi_j$, needs one gradient. That
# is why pruning by it is cheap, and it is just as cheap where the number of paths is astronomical:

# %%
module = pk.models.fc(width=100)
fc, weights = pk.from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 28, 28, 1))))
image = pk.ones_input((28, 28, 1))
print(f"tiny net: Tr Π = {float(pk.path_kernel.trace(network, params, ones)):.4f} by one gradient, "
      f"{np.trace(factors.pi):.4f} by its paths")
print(f"FC-100:   Tr Π = {float(pk.path_kernel.trace(fc, weights, image)):.4g}, "
      f"of 10^{float(pk.paths.log_count(fc, weights, image)):.1f} paths")

# %% [markdown]
# An eigenvector of $\Pi$ is a pattern over the paths that moves as one. The strongest two, drawn on the network:

# %%
values, vectors = np.linalg.eigh(factors.pi)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), dpi=110, layout="constrained")
for i, ax in enumerate(axes):
    pk.plots.paths(factors.paths, vectors[:, -1 - i], ax=ax, label="entry of the eigenvector")
    ax.set_title(f"eigenvector {i + 1} of Π, π = {values[-1 - i]:.2f}", fontsize=10, loc="left")

# %% [markdown]
# ## Theorem 1, and where it stops
#
# Let $\lambda$, $\nu$ and $\pi$ be the eigenvalues of $\Theta$, of the data factor $A = J_v^f {J_v^f}^{\!\top}$ and of
# $\Pi$, largest first. The paper claims
#
# $$\lambda_i \le \nu_i\, \pi_i \quad \text{for every } i, \qquad \sum_i \lambda_i \le \sum_i \nu_i\, \pi_i .$$
#
# The sum is right: it is von Neumann's trace inequality. The first claim is right for $i = 1$, and false in general.
# Two paths are enough to see why. Take a linear network with diagonal weights:

# %%
pair = {"first": {"kernel": jnp.diag(jnp.array([0.5**0.5, 1.0]))},
        "second": {"kernel": jnp.diag(jnp.array([0.5**0.5, 1.0]))}}
masks = jax.tree.map(lambda kernel: kernel != 0, pair)
data = jnp.array([[2.0**0.5, 0.0], [0.0, 1.0]])


def linear(params, x):
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


two = pk.paths.factorize(linear, pair, data, masks=masks)
strength, energy = np.diag(two.pi), (two.jvf**2).sum(axis=0)
figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), dpi=110, layout="constrained")
pk.plots.paths(two.paths, strength, ax=axes[0], label="its $\\Pi_{pp}$", limit=2.0)
axes[0].set_title("what the architecture gives each path", fontsize=10, loc="left")
pk.plots.paths(two.paths, energy, ax=axes[1], label="energy of its input", limit=2.0)
axes[1].set_title("what the data gives each path", fontsize=10, loc="left");

# %% [markdown]
# The paths share no weight, so $\Pi$ is diagonal, with $v_p^2\,(1/w_1^2 + 1/w_2^2)$ = 1 for the upper path and 2 for
# the lower. The input's energies are the other way round, 2 and 1. Each path multiplies its own two numbers, so both
# eigenvalues of $\Theta$ are 2. But *sorted* the numbers are $\nu = (2, 1)$ and $\pi = (2, 1)$, with
# $\nu_2 \pi_2 = 1 < 2 = \lambda_2$.

# %%
report = pk.analyze(linear, pair, data, masks=masks)
print("λ  ", report.lam[:2].round(6), "\nν π", (report.nu[:2] * report.pi[:2]).round(6), "\n")
for claim in report.claims.values():
    print(f"{'holds' if claim.holds else 'FAILS':6}{'theorem' if claim.proven else 'claim':8} {claim.text}")

# %% [markdown]
# What is missing from the bound is how the two sets of eigenvectors lie to each other. With
# $A = V \operatorname{diag}(\nu) V^\top$, left singular vectors $V$ and right ones $W$ of $J_v^f$, and the eigenvectors
# $U$ of $\Pi$, the overlaps $O = W^\top U$ give the trace exactly:
#
# $$\operatorname{Tr} \Theta = \sum_{ij} \nu_i\, \pi_j\, O_{ij}^2 .$$
#
# Here the data's strongest direction is the architecture's weakest path:

# %%
overlaps = report.overlaps[:2, :2] ** 2
print("O² =", overlaps.round(6).tolist())
print(f"Σ ν_i π_j O_ij² = {report.nu[:2] @ overlaps @ report.pi[:2]:.6f},  Tr Θ = {report.trace_ntk:.6f}")

# %% [markdown]
# ## How often does that happen?
#
# In dense networks the eigenvectors are spread over each other and every $\lambda_i$ stays far below $\nu_i \pi_i$.
# Pruning takes paths apart, towards the diagonal case above. Random networks of layers 10-12-12-4 on eight random
# inputs, with each weight kept by chance:

# %%
SIZES, DENSITIES = (10, 12, 12, 4), (1.0, 0.3, 0.1)


def layers(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]


@jax.jit
def three_matrices(key, density):
    """Θ, the blocks of A, and G, of a random network."""
    draw, keep, inputs = jax.random.split(key, 3)
    shapes = list(pairwise(SIZES))
    params = [jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5
              for key, shape in zip(jax.random.split(draw, 3), shapes, strict=True)]
    masks = [jax.random.bernoulli(key, density, shape)
             for key, shape in zip(jax.random.split(keep, 3), shapes, strict=True)]
    X = jax.random.normal(inputs, (8, SIZES[0]))
    theta = pk.ntk(layers, params, X, masks=masks).transpose(0, 2, 1, 3).reshape(32, 32)
    gram = pk.path_kernel.dense(layers, params, pk.ones_input(SIZES[:1], X.dtype), masks=masks)
    return theta, pk.data_factor(layers, params, X, masks=masks), gram


def largest(matrices):
    return np.sort(np.linalg.eigvalsh(np.asarray(matrices)).ravel())[:-33:-1]


ratios, broken, sums_hold = {}, {}, {}
for density in DENSITIES:
    lam, nu, pi = (np.array(values) for values in zip(
        *(map(largest, three_matrices(key, density)) for key in jax.random.split(jax.random.key(1), NETWORKS)),
        strict=True))
    meaningful = lam > 1e-10 * lam[:, :1]
    ratios[density] = np.where(meaningful, lam / np.maximum(nu * pi, 1e-300), np.nan)
    broken[density] = (ratios[density] > 1 + 1e-9).any(axis=1)
    sums_hold[density] = bool(np.all(lam.cumsum(axis=1) <= (nu * pi).cumsum(axis=1) * (1 + 1e-9)))
    print(f"density {density}: λ_i ≤ ν_i π_i fails somewhere in {broken[density].mean():4.0%} of {NETWORKS} networks, "
          f"{'all' if sums_hold[density] else 'NOT ALL'} sums hold")

# %% [markdown]
# Each line below is one network. The line at 1 is the bound of the first claim; above it, in vermillion, are the
# eigenvalues that break it.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), dpi=110, sharey=True, layout="constrained")
for ax, density in zip(axes, DENSITIES, strict=True):
    index = np.arange(1, 33)
    for ratio in ratios[density]:
        ax.plot(index, ratio, color=pk.plots.BLUE, linewidth=0.7, alpha=0.5)
        over = ratio > 1 + 1e-9
        ax.plot(index[over], ratio[over], "o", color=pk.plots.VERMILLION, markersize=4)
    ax.axhline(1, color=pk.plots.BLACK, linewidth=1, linestyle="--")
    ax.set_yscale("log")
    ax.set_title(f"density {density}: {broken[density].mean():.0%} break it", fontsize=10)
    ax.set_xlabel("index $i$")
axes[0].set_ylabel("$\\lambda_i \\,/\\, \\nu_i \\pi_i$");

# %% [markdown]
# So: compare spectra by their sums and products, use $\lambda_1 \le \nu_1 \pi_1$, and where the question is *which*
# direction learns, ask the overlaps. `pk.analyze` reports all of it for any network; the notebook
# `3_ntk_against_path_kernel` does so on images.
