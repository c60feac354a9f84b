"""Scores: parameters in, a tree like them out, in which a higher number is kept."""
