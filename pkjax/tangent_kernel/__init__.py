"""The tangent kernel Θ and the data factor A: layer by layer, in tiles, or by products alone."""
