"""The command line, which parses options, calls the library and prints the results."""

from featpatch.cli import demo, inspect, measure, steer, study
from featpatch.cli.app import app

__all__ = ["app", "demo", "inspect", "measure", "steer", "study"]
