"""A network in int8: its calibration, and what that costs."""
