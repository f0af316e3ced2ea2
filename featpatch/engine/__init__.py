"""The exact sweep: run every patch and measure the metric."""

from featpatch.engine.budget import free_memory, row_budget, row_bytes, trace_bytes
from featpatch.engine.deltas import Deltas
from featpatch.engine.journal import Book, ClosedBook, Journal
from featpatch.engine.path import PatchPath, SlowPathWarning, choose_path
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.sweep import Sweep
from featpatch.engine.work import BaseRun, Block

__all__ = [
    "BaseRun",
    "Block",
    "Book",
    "ClosedBook",
    "Deltas",
    "Journal",
    "PatchPath",
    "SlowPathWarning",
    "SuffixPath",
    "Sweep",
    "choose_path",
    "free_memory",
    "row_budget",
    "row_bytes",
    "trace_bytes",
]
