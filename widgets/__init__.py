"""The notebooks' widgets, figures and tables: presentation only.

Static figures use plotly, and interactive widgets use anywidget. This package may import `refine_lab`; `refine_lab`
never imports it.
"""
