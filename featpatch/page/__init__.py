"""Plain data as one self-contained HTML file that needs no network, and tables as text. Knows nothing of models or effects."""

from featpatch.page.frame import ROWS, Frame, text
from featpatch.page.page import Block, Section, block, figure, page, table, write

__all__ = ["ROWS", "Block", "Frame", "Section", "block", "figure", "page", "table", "text", "write"]
