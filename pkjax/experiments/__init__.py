"""The paper's experiments: sweeps, their records and figures."""
