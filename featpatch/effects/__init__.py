"""The table of metric values of patched runs, with the effects and intervals derived from it."""
