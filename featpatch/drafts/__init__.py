"""Pairs as words, and what a tokenizer makes of them: what tasks are written with."""

from featpatch.drafts.draft import Draft, draft, fill
from featpatch.drafts.draw import chosen, draw, pair_of, usable

__all__ = ["Draft", "chosen", "draft", "draw", "fill", "pair_of", "usable"]
