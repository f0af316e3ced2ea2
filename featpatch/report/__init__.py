"""Results for people: tables."""

from featpatch.report.tables import planned, ranked, site_summary

__all__ = ["planned", "ranked", "site_summary"]
