"""Comparison of features with components: how far the two rankings agree, and which component writes which feature."""
