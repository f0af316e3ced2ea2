"""Ranking over more pairs than fit into memory: pairs are read block by block, and effects stored as Parquet files."""
