"""The command line, which parses options, calls the library and prints the results."""

from featpatch.cli import check, components, demo, estimate, info, plan, rank, report, stream, study, tasks, verify
from featpatch.cli.app import app

__all__ = [
    "app", "check", "components", "demo", "estimate", "info", "plan", "rank", "report", "stream", "study", "tasks", "verify",
]  # fmt: skip
