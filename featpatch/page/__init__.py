"""Self-contained HTML pages that need no network, and tables as text, from plain data without models or effects."""

from featpatch.page.frame import ROWS, Frame, text
from featpatch.page.page import Block, Section, block, figure, page, table, write

__all__ = ["ROWS", "Block", "Frame", "Section", "block", "figure", "page", "table", "text", "write"]
