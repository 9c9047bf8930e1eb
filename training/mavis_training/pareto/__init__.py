"""Whole trade-offs between objectives: methods at every weighting, their fronts, and how sure the differences are."""
