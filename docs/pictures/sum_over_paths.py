"""Draws the picture of the first page: a network as a sum over paths, and Θ = J Π Jᵀ in its own numbers.

Run as ``python docs/pictures/sum_over_paths.py docs/pictures/sum_over_paths.svg``.
"""

import sys
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pkjax as pk
from matplotlib.figure import Figure

BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#9a9a9a"
SHOWN = (1, 1, 0)
"""The path that stands out, by the places of its nodes in their layers."""


def network() -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Two inputs, three hidden units with ReLU, two outputs, without biases: 12 paths; and three examples."""
    keys = jax.random.split(jax.random.key(3), 3)
    weights = {"a": jax.random.normal(keys[0], (2, 3)), "b": jax.random.normal(keys[1], (3, 2))}
    return lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], weights, jax.random.normal(keys[2], (3, 2))


def matrices() -> dict[str, np.ndarray]:
    """J_v^f, Π and Θ of that network, Θ from its tangent kernel and not from the other two."""
    apply_fn, weights, X = network()
    listed = pk.paths.factorize(apply_fn, weights, X)
    theta = pk.ntk(apply_fn, weights, X).transpose(0, 2, 1, 3).reshape(6, 6)
    return {"J": np.asarray(listed.jvf), "Π": np.asarray(listed.pi), "Θ": np.asarray(theta)}


def draw_network(ax: Any) -> None:
    """Nodes, edges, and one path with its weights."""
    columns = [[(0.0, y) for y in (0.75, -0.75)], [(1.3, y) for y in (1.3, 0.0, -1.3)],
               [(2.6, y) for y in (0.75, -0.75)]]
    for left, right in pairwise(columns):
        for a in left:
            for b in right:
                ax.plot(*zip(a, b, strict=True), color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
    route = [layer[i] for layer, i in zip(columns, SHOWN, strict=True)]
    ax.plot(*zip(*route, strict=True), color=VERMILLION, linewidth=3, zorder=2)
    for layer, name in zip(columns, ("x", "", "f"), strict=True):
        for i, (x, y) in enumerate(layer):
            on = layer[SHOWN[columns.index(layer)]] == (x, y)
            ax.scatter([x], [y], s=420, color="white", edgecolor=VERMILLION if on else BLUE, linewidth=1.8, zorder=3)
            label = f"${name}_{i + 1}$" if name else "ReLU"
            ax.text(x, y, label, ha="center", va="center", fontsize=10 if name else 6.5, zorder=4)
    ax.text(0.72, -0.72, "$\\theta_i$", color=VERMILLION, fontsize=11, ha="center")
    ax.text(2.12, 0.02, "$\\theta_j$", color=VERMILLION, fontsize=11, ha="center")
    ax.text(1.3, -2.2, "$f_k(x)=\\sum_{p\\to k}\\; v_p(\\theta)\\; a_p(x)\\; x_{s(p)}$", ha="center", fontsize=12)
    ax.text(1.3, -2.6, "$v_p$: product of the weights on path $p$\n$a_p$: is it open?  $x_{s(p)}$: where it starts",
            ha="center", va="top", fontsize=8, color="#333333")
    ax.set(xlim=(-0.5, 3.1), ylim=(-3.5, 1.75))
    ax.axis("off")


def draw_matrix(figure: Any, box: list[float], values: np.ndarray, title: str, about: str) -> None:
    """One matrix, in colours of its own, by the roots of its entries, which leaves the small ones to be seen."""
    ax = figure.add_axes(box)
    roots = np.sign(values) * np.sqrt(np.abs(values))
    top = np.abs(roots).max()
    ax.imshow(roots, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=11, pad=5)
    ax.text(0.5, -0.06, about, ha="center", va="top", fontsize=8, transform=ax.transAxes, color="#333333")


def draw() -> Figure:
    """Draw the picture."""
    named = matrices()
    figure = Figure(figsize=(8.6, 3.6), facecolor="white")
    draw_network(figure.add_axes([0.0, 0.03, 0.31, 0.94]))
    parts = (("Θ", named["Θ"], "tangent\nkernel\n(NK × NK)"),
             ("$J_v^f$", named["J"], "data: open paths,\ninputs\n(NK × P)"),
             ("Π", named["Π"], "path kernel: architecture\nand weights, no data\n(P × P)"),
             ("$(J_v^f)^{\\top}$", named["J"].T, "data\n(P × NK)"))
    cell, left = 0.0158, 0.335                             # width of an entry; the height follows from the figure's
    for (title, values, about), sign in zip(parts, ("=", "·", "·", ""), strict=True):
        rows, columns = values.shape
        height = rows * cell * 8.6 / 3.6
        draw_matrix(figure, [left, 0.54 - height / 2, columns * cell, height], values, title, about)
        left += columns * cell + 0.03
        figure.text(left - 0.015, 0.54, sign, ha="center", va="center", fontsize=16)
    return figure


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    draw().savefig(sys.argv[1], metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
