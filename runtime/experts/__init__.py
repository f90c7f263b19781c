"""Experts that do not all fit the device: slots, eviction, copies, guesses, and a record of them all."""
