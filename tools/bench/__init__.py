"""One file per subcommand of `tools.bench`: each has `add_arguments(parser)` and `run(args)`, a report."""
