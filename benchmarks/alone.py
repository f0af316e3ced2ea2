"""A measurement in a process of its own, whose caches and peak of memory are its own."""

import json
import subprocess
import sys
from typing import Any


def alone(script: str, *options: str) -> Any:
    """What the last line of the script's output holds, as JSON; all its lines go to standard error."""
    done = subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])
