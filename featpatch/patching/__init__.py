"""Exact patching of features, components and sets of nodes, ablation, and `do` for patching by hand."""
