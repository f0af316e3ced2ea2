"""Self-contained HTML pages that need no network, from plain data without models or effects."""
