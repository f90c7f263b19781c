"""Damage to files that knows their structure."""
