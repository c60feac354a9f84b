# %% [markdown]
# # Forecasting convergence
#
# How far will training move the weights, and how fast? A wide network trains like its linearisation, and the linearised
# network's training is solved by the spectrum of the tangent kernel $\Theta$. The paper goes one step further and lets
# one number, the trace of the path kernel, stand for that spectrum. This notebook follows both steps on real images,
# and says where each of them works and where it does not.

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
import pkjax as pk

jax.config.update("jax_default_matmul_precision", "highest")     # spectra need every digit that the device has
print(f"JAX {jax.__version__} runs on {jax.default_backend().upper()}: {jax.devices()[0].device_kind}")

# %% [markdown]
# Images, steps of gradient descent, the widths to compare, and for the last section seeds and compressions.

# %% tags=["parameters"]
SAMPLES = 20
STEPS = 1000
NARROW, WIDE = 20, 500
WIDTH = 100                     # of the networks that are pruned
SEEDS = 3
COMPRESSIONS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]

# %%
digits = pk.data.load("digits", samples=SAMPLES)
X, y = jnp.asarray(digits.images), jax.nn.one_hot(digits.labels, 10)
ones = pk.ones_input(X.shape[1:])


def network(width, seed=0):
    module = pk.models.fc(width=width, depth=2)
    return pk.from_linen(module, module.init(jax.random.key(seed), X))


# %% [markdown]
# ## The linearised network in closed form
#
# Replace the network by its tangent at the initialisation and let gradient flow at the learning rate $\eta$ minimise
# $L = \tfrac12 \sum (f - y)^2$. Then
#
# $$f_t = y + e^{-\eta \Theta t} (f_0 - y), \qquad
#   \lVert \omega_t \rVert^2 = c_t^\top \Theta\, c_t, \quad c_t = \Theta^{-1} (I - e^{-\eta \Theta t}) (f_0 - y),$$
#
# with $\omega_t = \theta_t - \theta_0$. Each eigenvector of $\Theta$ learns at its own rate $\eta \lambda_i$, and the
# rates of one network differ by orders of magnitude. In steps of gradient descent $(1 - \eta\lambda_i)^t$ stands for
# $e^{-\eta\lambda_i t}$.

# %%
apply_fn, params = network(WIDE)
theta = pk.ntk(apply_fn, params, X)
f0 = apply_fn(params, X)
rows = f0.size
lam, vectors = np.linalg.eigh(np.asarray(theta, np.float64).transpose(0, 2, 1, 3).reshape(rows, rows))
lam, vectors = lam[::-1], vectors[:, ::-1]
rate = 1 / lam[0]
print(f"λ from {lam[0]:.4g} to {lam[-1]:.4g}; at η = 1/λ₁ the slowest direction needs {lam[0] / lam[-1]:.0f} steps")

line = pk.dynamics.linearized(theta, f0, y, learning_rate=rate, t=jnp.arange(STEPS + 1), discrete=True)
left = np.asarray(line.outputs - y, np.float64).reshape(STEPS + 1, rows) @ vectors
closed = (1 - rate * lam) ** (STEPS // 10) * left[0]
print(f"after {STEPS // 10} steps, the error along every eigenvector is (1 − ηλ_i)^{STEPS // 10} of what it was, to "
      f"{abs(left[STEPS // 10] - closed).max():.1e}")

# %% [markdown]
# The ten largest eigenvalues are apart: images resemble each other, and what they share is learned first, once for each
# of the ten outputs.

# %%
figure, (one, two) = plt.subplots(1, 2, figsize=(11, 3.6), dpi=110, layout="constrained")
one.plot(np.arange(1, rows + 1), lam, color=pk.plots.BLUE, linewidth=1.8)
one.set(yscale="log", xlabel="index $i$", ylabel="$\\lambda_i$", title="Spectrum of Θ")
shown = [0, rows // 20, rows // 4, rows // 2, rows - 1]
for index, colour in zip(shown, plt.get_cmap("cividis")(np.linspace(0, 0.9, len(shown))), strict=True):
    two.plot(np.arange(1, STEPS + 1), np.abs((1 - rate * lam[index]) ** np.arange(1, STEPS + 1)), color=colour,
             label=f"i = {index + 1}", linewidth=1.8)
two.set(xscale="log", xlabel="step $t$", ylabel="$(1 - \\eta \\lambda_i)^t$", title="What is left of the error")
two.legend(fontsize=9, frameon=False)
for ax in (one, two):
    ax.grid(linewidth=0.4, alpha=0.5)

# %% [markdown]
# ## Beside the real network
#
# `pk.experiments.trajectories` trains the network itself by gradient descent and sets the linearised one beside it. The
# wider, the closer. The dotted curve is the forecast of the next section.

# %%
runs, gaps = {}, {}
for width in (NARROW, WIDE):
    runs[width] = pk.experiments.trajectories(*network(width), X, y, steps=STEPS)
    real, linear = (kind["weight_change"] for kind in (runs[width].measured, runs[width].linearized))
    gaps[width] = float(np.abs(real - linear).max() / real.max())
    print(f"width {width:4}: ‖ω_t‖ of the linearised network is off by at most {gaps[width]:.1%}")

# %%
pk.plots.trajectories(runs[NARROW], f"Width {NARROW}")

# %%
pk.plots.trajectories(runs[WIDE], f"Width {WIDE}")

# %% [markdown]
# ## Any loss
#
# Under another loss there is no closed form, but the same $\Theta$ and an ordinary differential equation:
# `pk.dynamics.flow` integrates it. Cross entropy, which never stops pushing, beside small steps of the real network:

# %%
def cross_entropy(f):
    return -(jax.nn.log_softmax(f) * y).sum()


times = np.geomspace(1, STEPS, 7).round().astype(int)
flow = pk.dynamics.flow(theta, f0, cross_entropy, learning_rate=rate, t=times.astype(np.float64), rtol=1e-4)


@jax.jit
def descend(params, count):
    def step(_, p):
        slope = jax.grad(lambda p: cross_entropy(apply_fn(p, X)))(p)
        return jax.tree.map(lambda leaf, g: leaf - jnp.asarray(rate, leaf.dtype) * g, p, slope)
    return jax.lax.fori_loop(0, count, step, params)


print("step", *(f"{t:9}" for t in times))
print("flow", *(f"{float(value):9.4f}" for value in flow.loss))
real_losses, now = [], params
for count in np.diff(times, prepend=0):
    now = descend(now, int(count))
    real_losses.append(float(cross_entropy(apply_fn(now, X))))
print("real", *(f"{value:9.4f}" for value in real_losses))

# %% [markdown]
# ## One number for a spectrum: along time
#
# The paper's forecast puts $\operatorname{Tr} \Pi$, which no data entered, in the place of $\Theta$:
#
# $$\lVert \omega_t \rVert \approx a\, \bigl(1 - e^{-\eta \operatorname{Tr}(\Pi)\, t}\bigr) .$$
#
# Along the time of *one* network it fails, as the dotted curves above show, for two reasons. One exponential has one
# time scale, and the spectrum has many. And a trace adds up all eigenvalues, where each direction learns at the rate of
# its own: here $\operatorname{Tr} \Pi$ is above even $\lambda_1$, the fastest. The fit of $a$ does not help. Let the
# rate be fitted as well, and see how far from $\operatorname{Tr} \Pi$ the best one lies:

# %%
run = runs[WIDE]
options = {"learning_rate": run.learning_rate, "t": run.steps}
r2_in_time = float(pk.dynamics.fit_forecast(run.trace_pi, run.measured["weight_change"], **options).r_squared)
grid = run.trace_pi * np.geomspace(1e-6, 1, 61)
fits = [float(pk.dynamics.fit_forecast(trace, run.measured["weight_change"], **options).r_squared) for trace in grid]
best = int(np.argmax(fits))
print(f"Tr Π = {run.trace_pi:.4g}, λ₁ = {lam[0]:.4g}: the forecast is complete after "
      f"{3 / (run.learning_rate * run.trace_pi):.2g} steps")
print(f"along time, the forecast by Tr Π has R² = {r2_in_time:.2f}")
print(f"the best single exponential has R² = {fits[best]:.2f}, at a rate {run.trace_pi / grid[best]:.3g} times smaller")

# %% [markdown]
# ## One number for a spectrum: across networks
#
# That is not how the paper uses it. There, $t$ and $\eta$ are fixed and the *networks* vary: prune more, and
# $\operatorname{Tr} \Pi$ falls by orders of magnitude. Does it tell which network moves how far? Dense networks and
# networks pruned in three ways, all trained alike, with the learning rate of the first dense one:

# %%
apply_fn, first = network(WIDTH)


def synflow_l2(p):
    return pk.synflow_l2(apply_fn, p, ones)


def random(p):
    return pk.random(p, key=jax.random.key(1))


dense_theta = np.asarray(pk.ntk(apply_fn, first, X), np.float64).transpose(0, 2, 1, 3).reshape(rows, rows)
common_rate = float(0.5 / np.linalg.eigvalsh(dense_theta)[-1])


@jax.jit
def train(params, masks):
    """‖ω_t‖ after 10 steps and after all, with Tr Π and Tr Θ at the start."""
    start = pk.apply_masks(params, masks)

    def step(_, p):
        slope = jax.grad(lambda p: ((apply_fn(p, X) - y) ** 2).sum() / 2)(p)
        moved = jax.tree.map(lambda leaf, g: leaf - jnp.asarray(common_rate, leaf.dtype) * g, p, slope)
        return pk.apply_masks(moved, masks)

    def change(p):
        return jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, start)), strict=True)))

    early = jax.lax.fori_loop(0, 10, step, start)
    late = jax.lax.fori_loop(10, STEPS, step, early)
    return {"Tr Π": pk.path_kernel.trace(apply_fn, params, ones, masks=masks),
            "gated trace": pk.path_kernel.gated_trace(apply_fn, params, X, masks=masks),
            "Tr Θ": pk.ntk_trace(apply_fn, params, X, masks=masks), "early": change(early), "late": change(late)}


table = []
for seed in range(SEEDS):
    start = network(WIDTH, seed)[1]
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), start)
    masks = {("dense", 0.0): everything}
    pruners = {"random": (random, 1), "magnitude": (pk.magnitude, 1), "SynFlow-L2": (synflow_l2, 50)}
    for name, (score_fn, steps) in pruners.items():
        for rho in COMPRESSIONS:
            masks[name, rho] = pk.prune(score_fn, start, compression=rho, steps=steps, min_per_layer=10).masks
    for (name, rho), mask in masks.items():
        table.append({"pruner": name, "rho": rho} | {k: float(v) for k, v in train(start, mask).items()})
print(f"{len(table)} networks; η Tr Π from {common_rate * min(r['Tr Π'] for r in table):.2g} to "
      f"{common_rate * max(r['Tr Π'] for r in table):.2g} a step")

# %% [markdown]
# Fitted across networks, for each time: the paper's curve, whose rate $\operatorname{Tr} \Pi$ fixes, and a straight
# line in the logarithm of each of three traces.

# %%
def line_r2(predictor, moment):
    x, z = np.log([row[predictor] for row in table]), np.array([row[moment] for row in table])
    return float(np.corrcoef(x, z)[0, 1] ** 2)


traces = np.array([row["Tr Π"] for row in table])
scores, curves = {}, {}
for moment, t in (("early", 10), ("late", STEPS)):
    moved = np.array([row[moment] for row in table])
    fit = pk.dynamics.fit_forecast(traces, moved, learning_rate=common_rate, t=float(t))
    scores[moment] = {"forecast": float(fit.r_squared)} | {name: line_r2(name, moment)
                                                           for name in ("Tr Π", "gated trace", "Tr Θ")}
    span = np.geomspace(traces.min(), traces.max(), 200)
    curves[moment] = span, np.asarray(pk.dynamics.forecast(span, learning_rate=common_rate, t=float(t), a=fit.a))
    print(f"t = {t:5}: R² of the forecast {scores[moment]['forecast']:5.2f}; of a line in ln Tr Π "
          f"{scores[moment]['Tr Π']:.2f}, ln gated trace {scores[moment]['gated trace']:.2f}, "
          f"ln Tr Θ {scores[moment]['Tr Θ']:.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=110, layout="constrained")
markers = {"dense": ("*", pk.plots.BLACK), "random": ("X", "#8C8C8C"), "magnitude": ("^", pk.plots.ORANGE),
           "SynFlow-L2": ("s", pk.plots.VERMILLION)}
for ax, (moment, t) in zip(axes, (("early", 10), ("late", STEPS)), strict=False):
    for name, (marker, colour) in markers.items():
        group = [row for row in table if row["pruner"] == name]
        ax.plot([row["Tr Π"] for row in group], [row[moment] for row in group], marker, color=colour, label=name,
                linestyle="none", markersize=6, alpha=0.8)
    ax.plot(*curves[moment], ":", color=pk.plots.BLACK, linewidth=1.8, label="forecast by Tr Π")
    ax.set(xscale="log", xlabel="Tr Π", ylabel="$\\|\\omega_t\\|$",
           title=f"After {t} steps: R² = {scores[moment]['forecast']:.2f}")
    ax.grid(linewidth=0.4, alpha=0.5)
axes[0].legend(fontsize=9, frameon=False)
bars = ["forecast", "Tr Π", "gated trace", "Tr Θ"]
for place, moment in enumerate(scores):
    heights = [max(scores[moment][name], 0) for name in bars]
    axes[2].bar(np.arange(4) + 0.4 * place - 0.2, heights, 0.37, color=[pk.plots.BLUE, pk.plots.ORANGE][place],
                hatch=["", "//"][place], edgecolor="white", label=f"after {(10, STEPS)[place]} steps")
axes[2].set_xticks(range(4), ["forecast", "line in\nln Tr Π", "line in ln\ngated trace", "line in\nln Tr Θ"])
axes[2].set(ylabel="R² across networks (0 where negative)", title="What tells how far weights move", ylim=(0, 1.25))
axes[2].legend(fontsize=9, frameon=False, loc="upper left");

# %% [markdown]
# So the verdict is mixed. Early, while $\eta \operatorname{Tr}(\Pi)\, t$ is about 1 for the networks in question, the
# paper's curve orders them rightly, by a number that costs one gradient and no data. Late, it is flat where most of the
# networks are, for it takes them to be done; a line in $\ln \operatorname{Tr} \Pi$ goes on telling them apart, about
# as well as the traces that do see the data. And along the time of a single network it is the spectrum that counts, not
# its sum: there use `pk.dynamics.linearized`, which was right to a few percent above. All of this is one small data set
# and one kind of network; `pkjax sweep` and `pkjax figures` repeat it on others.
