"""Commands around the runtime: each is `python -m tools.NAME`."""
