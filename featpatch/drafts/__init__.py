"""Pairs written as words, and their conversion to token ids, for the built-in tasks."""

from featpatch.drafts.draft import Draft, draft, fill
from featpatch.drafts.draw import chosen, draw, pair_of, usable

__all__ = ["Draft", "chosen", "draft", "draw", "fill", "pair_of", "usable"]
