"""Calls that several GPUs share: a rank on each."""
