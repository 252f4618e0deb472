"""The components of the widgets."""
