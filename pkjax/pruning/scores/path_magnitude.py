"""Path magnitude: what the path norm would lose without each weight."""

import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.scores.data_free import path_scores
from pkjax.trees import ApplyFn

__all__ = ["path_magnitude"]


@automatic_axes
def path_magnitude(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
                   pool: str = "sum", batch_norm: str = "folded") -> PyTree:
    """Score weights by what the ℓ1 path norm loses without them: at any time, also after training.

        S = |θ| ∘ ∂‖Φ‖_1/∂|θ|,   S_j = ‖Φ(θ) − Φ(θ without θ_j)‖_1 for a parameter that lies once on a path

    Scaling a unit's inputs by λ and its outputs by 1/λ changes no score, as it changes no path; magnitude has no such
    invariance. The formula is that of SynFlow: ``path_magnitude(..., batch_norm="paths")`` is ``synflow`` with x of
    ones. What differs is the use: path magnitude ranks trained weights, mostly at once; SynFlow untrained ones, in many
    steps. Frozen BatchNorms have means after training, for which its source folds them into the biases, the default
    here. There scores of γ and β are magnitudes |θ ∘ ∂‖Φ‖_1/∂θ|: a mean that cancels a bias makes the norm fall.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters θ, of a trained network for example.
        x: an input ``(1, *input)`` of ones (``pkjax.ones_input``).
        pool: "sum" or "max", as in ``synflow``.
        batch_norm: "folded", "paths" or "signed", as in ``synflow``.

    Returns:
        Scores like ``params``, over a power of two where those of ``synflow`` are.

    Raises:
        ValueError: x is negative or not finite; the convention is unknown, or "signed" with another pool than "max".
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: a score is not finite.

    Source: Gonon, Brisebarre, Riccietti and Gribonval (2025), the pruning cost Φ-Cost (arXiv 2405.15006).

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [2.]])}
        >>> scores = path_magnitude(lambda p, x: jnp.maximum(x @ p["a"], 0.) @ p["b"], params, jnp.ones((1, 1)))
        >>> scores["a"].tolist(), scores["b"].tolist()      # of paths of values 3 and −4
        ([[3.0, 4.0]], [[3.0], [4.0]])
    """
    return path_scores(apply_fn, params, x, 1, 1, pool, batch_norm, "path_magnitude").scores
