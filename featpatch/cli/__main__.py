"""`python -m featpatch.cli` is `featpatch`."""

from featpatch.cli import app

app()
