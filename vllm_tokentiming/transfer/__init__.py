"""Drafted tokens become proposals, and the draft's probabilities their proposal distributions. Knows tensors."""
