"""Bounds, calibration, coverage, and comparison at equal loss."""
