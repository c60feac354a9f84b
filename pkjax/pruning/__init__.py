"""Scores, masks, and the one loop that draws masks from scores."""
