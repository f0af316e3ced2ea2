"""Where the forward passes of a sweep run: here, or on the workers of a distributed engine. Knows no model."""

from featpatch.execution.executor import Batch, Executor, Shards, executor_of
from featpatch.execution.ray import Ray

__all__ = ["Batch", "Executor", "Ray", "Shards", "executor_of"]
