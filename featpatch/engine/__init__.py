"""The exact sweep over patches."""

from featpatch.engine.budget import row_budget, row_bytes
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
    "row_budget",
    "row_bytes",
]
