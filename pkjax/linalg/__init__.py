"""Block Lanczos, stochastic estimates and memory: numerical linear algebra without paths in it."""
