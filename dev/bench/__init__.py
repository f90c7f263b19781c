"""Measurements that the project's own choices rest on: one file per subcommand of `python -m dev.bench`."""
