"""Many pairs: block by block from disk, effects to partitioned Parquet, read back lazily."""

from featpatch.streaming.stored import Stored
from featpatch.streaming.stream import stream_features

__all__ = ["Stored", "stream_features"]
