"""Calibrations learnt from measured runs."""
