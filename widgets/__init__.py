"""What a notebook shows: static figures (plotly) and live curves (a small anywidget). Presentation only.

It may import `refine_lab`; `refine_lab` never imports it.
"""
