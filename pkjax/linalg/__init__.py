"""Numerical linear algebra that knows nothing of paths: block Lanczos, random estimates, memory."""
