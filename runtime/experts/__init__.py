"""Experts that do not all fit the device: which are on it, which go, which come, and a record of it all."""
