"""Results for people: tables."""

from featpatch.report.tables import ranked, site_summary

__all__ = ["ranked", "site_summary"]
