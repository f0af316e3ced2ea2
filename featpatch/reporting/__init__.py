"""Results for people to read: the HTML report, and tables for a terminal."""
