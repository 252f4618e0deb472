"""The parts that the widgets of this package are made of."""
