"""Scratch of oneDNN's products on CPUs."""
