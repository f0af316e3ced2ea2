"""The one error class of the package.

Every message names the value that was met, what was expected, and what to do next.
"""


class FeatpatchError(ValueError):
    """Input that featpatch refuses; the message says value, expectation and next action."""
