"""Plain data as one HTML file: self-contained, without network; tables as text. Knows nothing of models or effects."""

from featpatch.page.frame import ROWS, Frame, text
from featpatch.page.page import Block, Section, block, figure, page, table, write

__all__ = ["ROWS", "Block", "Frame", "Section", "block", "figure", "page", "table", "text", "write"]
