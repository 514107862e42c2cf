"""Calibration: model x tokens -> statistics per site."""
