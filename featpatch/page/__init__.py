"""Plain data as one HTML file: self-contained, without network. Knows nothing of models or effects."""

from featpatch.page.page import Block, Section, block, figure, page, table, write

__all__ = ["Block", "Section", "block", "figure", "page", "table", "write"]
