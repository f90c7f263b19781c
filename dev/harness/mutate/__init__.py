"""Damage that knows the structure of what it damages."""
