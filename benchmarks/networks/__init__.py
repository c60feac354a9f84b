"""Public networks, as tests and `benchmarks.public_networks` take them."""
