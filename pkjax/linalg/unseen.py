"""What a Krylov space from random vectors tells of eigenvalues that it does not show.

An eigenvector u of eigenvalue λ has some weights w on the random block that a space starts with. Lanczos' recurrence
turns them into its weights on the whole basis, g = C(λ) w, and ‖g‖ ≤ ‖u‖ = 1. Above the values that the space shows, C
grows exponentially with every step: an eigenvector there would need weights w so small that random vectors hardly ever
have them.

For a block of one vector, 1/‖C(λ)‖² is Christoffel's function, which bounds the mass of a spectral measure at λ.
"""

import numpy as np

__all__ = ["Weights"]

_LEAST = 1e-12   # a coupling, in units of λ, at which the basis is closed
_MOST = 1e100    # a weight beyond which nothing more needs to be known


class Weights:
    """C(λ): weights on a basis of an eigenvector of eigenvalue λ, for each weight on the first block.

    Source: Golub and Meurant (2010), "Matrices, Moments and Quadrature", section 2 for the polynomials.

    Examples:
        >>> weights = Weights(1)                                           # a basis of one random vector
        >>> for _ in range(12):                                            # of an operator with values from 0 to 4
        ...     size = len(weights.on_basis)
        ...     row = np.eye(1, size, size - 1) * 2 + np.eye(1, size, size - 2)
        ...     weights.grow(5.0, row, np.ones((1, 1)))
        >>> weights.chance(10**6) < 0.01                                   # that a value 5 goes unseen
        True
    """

    def __init__(self, block: int) -> None:
        self.on_basis = np.eye(block)
        self._closed = False

    def grow(self, level: float, own: np.ndarray, coupling: np.ndarray) -> None:
        """Follow the recurrence from the newest block to the next.

        Args:
            level: λ.
            own: (p, size), the newest block's rows of the projected operator.
            coupling: (p, q), the products of the block's image with the next block.
        """
        if self._closed or not coupling.shape[1]:
            return
        right = level * self.on_basis[len(self.on_basis) - len(own):] - own @ self.on_basis
        u, sizes, v = np.linalg.svd(coupling, full_matrices=False)
        least = _LEAST * level
        self.on_basis = np.concatenate([self.on_basis, v.T @ ((u.T @ right) / np.maximum(sizes, least)[:, None])])
        # Beyond a closed space the next block is random: its weights are others. What is known remains true.
        self._closed = bool((sizes <= least).any() or np.abs(self.on_basis).max() > _MOST)

    def rotate(self, s: np.ndarray) -> None:
        """Follow a change of basis: its columns, (size, kept), are the rows that a restart keeps."""
        if not self._closed:
            self.on_basis = np.concatenate([s.T @ self.on_basis[:len(s)], self.on_basis[len(s):]])

    def chance(self, dimension: int) -> float:
        """Bound the chance that an eigenvector of this dimension has weights as small as they would have to be.

        Each of its weights on random vectors of unit length is normal, of variance 1 over the dimension.
        """
        sizes = np.linalg.svd(self.on_basis, compute_uv=False)
        return float(np.prod(np.minimum(1.0, np.sqrt(2 / np.pi * dimension) / np.maximum(sizes, 1.0))))
