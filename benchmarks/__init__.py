"""Timings; run each from the repository's root, as in ``python -m benchmarks.bench_pruning``."""
