"""The first lines of code in the README, run as at a Python prompt: the value of every expression is printed.

    python benchmarks/readme.py

The README quotes what this prints.
"""

import ast
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    """Run the code in an empty folder."""
    torch.set_num_threads(1)
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for statement in ast.parse(code).body:
            source = ast.get_source_segment(code, statement)
            assert source is not None
            if isinstance(statement, ast.Expr):
                print(f">>> {source}\n{eval(source, names)!r}\n")
            else:
                exec(source, names)
        os.chdir(README.parent)


if __name__ == "__main__":
    main()
