"""Rank features and paths exactly, either all of them or those with the largest estimates, with an audit of the others."""
