"""Turn result rows into scores, plots and one HTML page."""
