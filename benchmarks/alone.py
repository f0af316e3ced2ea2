"""Measurements in a separate process, so that caches and peak memory are not shared."""

import json
import subprocess
import sys
from typing import Any


def alone(script: str, *options: str) -> Any:
    """Run a script and return the JSON value in the last line of its output, which is also copied to standard error."""
    done = subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])
