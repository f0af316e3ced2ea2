"""The exact sweep: run every patch and measure the metric."""
