"""Processes that have some layers of a model each: how they meet, watch each other, and pass rows on."""
