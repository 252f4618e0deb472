"""Still figures (plotly) and tables."""
