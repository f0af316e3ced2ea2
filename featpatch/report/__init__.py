"""Results for people: tables."""

from featpatch.report.checklist import by_pair, totals
from featpatch.report.tables import by_tag_table, checked, planned, ranked, site_summary, stability_table

__all__ = ["by_pair", "by_tag_table", "checked", "planned", "ranked", "site_summary", "stability_table", "totals"]
