"""Executors: each module holds the executor of its name."""
