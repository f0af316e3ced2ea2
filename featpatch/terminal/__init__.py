"""Tables of results for a terminal."""

from featpatch.terminal.checklist import by_pair, totals
from featpatch.terminal.tables import by_tag_table, checked, planned, predicted, ranked, site_summary, stability_table

__all__ = ["by_pair", "by_tag_table", "checked", "planned", "predicted", "ranked", "site_summary", "stability_table", "totals"]
