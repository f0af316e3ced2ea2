"""Results for people: tables."""

from featpatch.report.tables import checked, planned, ranked, site_summary

__all__ = ["checked", "planned", "ranked", "site_summary"]
