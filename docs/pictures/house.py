"""Draws the folders of the package and their imports, which are read from the code.

Run from the repository's root as `python -m docs.pictures.house docs/pictures/house.svg`.
"""

import sys

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tests.house.test_architecture import FLOORS, GRAPH, room

BLUE, GREY, INK = "#0072b2", "#9a9a9a", "#333333"
GROUND = " · ".join(FLOORS[0])
ROOMS = {
    GROUND: (-1, 0, "errors, files, tables, parameter trees"),
    "linalg": (-2, 2, "Lanczos, estimates, memory"), "programs": (-1, 1, "JAX programs, compared"),
    "models": (0, 1, "FC, VGG, ResNet"), "adapters": (1, 1, "Linen, NNX"), "data": (2, 1, "data sets"),
    "network": (-1, 2, "the door: read, checked"), "paths": (-1, 3, "a network is a sum over paths"),
    "path_kernel": (-2, 4, "Π and its dual G"), "tangent_kernel": (-1, 4, "Θ and A"),
    "pruning": (0, 4, "scores, masks, the loop"),
    "analysis": (-1.5, 5, "Θ, Π and A side by side"), "dynamics": (-0.4, 5, "linearised training"),
    "training": (1, 5, "training under masks"),
    "plots": (-1, 6, "pictures"), "experiments": (0, 7, "runs, sweeps, figures"),
    "cli": (0, 8, "commands, HTML report"),
}
"""Column and row of each box, and what it holds; the files on the ground floor share one box."""


def arrows() -> list[tuple[str, str]]:
    """The imports between boxes, except those that other arrows imply."""
    below: dict[str, set[str]] = {name: set() for name in ROOMS}
    for name, targets in GRAPH.items():
        for target in targets:
            source, end = (GROUND if room(each) in FLOORS[0] else room(each) for each in (name, target))
            if source in ROOMS and end in ROOMS and source != end:
                below[source].add(end)

    def reached(name: str) -> set[str]:
        return below[name].union(*map(reached, below[name]))

    return sorted((name, end) for name in below for end in below[name]
                  if not any(end in reached(other) for other in below[name]))


def draw() -> Figure:
    """Draw the picture."""
    width, height, across, up = 1.72, 0.5, 1.95, 0.85
    figure = Figure(figsize=(8.2, 6.2), facecolor="white")
    ax = figure.add_axes([0, 0, 1, 1])
    for source, end in arrows():
        (x, y, _), (to_x, to_y, _) = ROOMS[source], ROOMS[end]
        if end == GROUND:                                # a wide box: arrows need not meet in its middle
            to_x += max(-0.4, min(0.4, x - to_x))
        ax.annotate("", (to_x * across, to_y * up + height / 2), (x * across, y * up - height / 2),
                    arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1, "shrinkA": 0, "shrinkB": 0})
    for name, (x, y, about) in ROOMS.items():
        size = 1.5 * width if name == GROUND else width
        ax.add_patch(FancyBboxPatch((x * across - size / 2, y * up - height / 2), size, height, facecolor="white",
                                    boxstyle="round,pad=0,rounding_size=0.08", edgecolor=BLUE, linewidth=1.3))
        title = name if name in (GROUND, "network") else f"{name}/"
        ax.text(x * across, y * up + 0.08, title, ha="center", va="center", fontsize=9.5)
        ax.text(x * across, y * up - 0.14, about, ha="center", va="center", fontsize=6.6, color=INK)
    ax.set(xlim=(-2.5 * across, 2.5 * across), ylim=(-0.35, 8 * up + 0.35))
    ax.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(sys.argv[1], metadata={"Date": None, "Description": repr(arrows())},
                   bbox_inches="tight", pad_inches=0.03)
