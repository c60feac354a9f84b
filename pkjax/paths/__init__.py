"""Networks as sums over paths: the path polynomial, gates, taps and enumeration."""
