"""Pairs of a clean and a corrupted prompt, with their answers and labelled positions."""
