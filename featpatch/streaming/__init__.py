"""Ranking over more pairs than fit into memory: pairs are read block by block, and effects stored as Parquet files."""

from featpatch.streaming.stored import Stored
from featpatch.streaming.stream import stream_features

__all__ = ["Stored", "stream_features"]
