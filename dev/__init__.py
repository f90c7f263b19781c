"""What only developers run: the harness that tries to break everything, and comparisons with other programs.
Nothing here is installed."""
