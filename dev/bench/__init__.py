"""Measurements behind the project's own choices: one file per subcommand of `python -m dev.bench`."""
