"""The command line: parse, call, print."""

from featpatch.cli import check, components, demo, estimate, info, plan, rank, report, stream, study, tasks, verify
from featpatch.cli.app import app

__all__ = [
    "app", "check", "components", "demo", "estimate", "info", "plan", "rank", "report", "stream", "study", "tasks", "verify",
]  # fmt: skip
