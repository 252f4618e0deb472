"""Static figures (plotly) and tables."""
