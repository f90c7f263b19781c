"""Use a server as many clients do, and badly: `python -m dev.soak`."""
