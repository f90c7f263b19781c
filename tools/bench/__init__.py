"""Benchmarks: each subcommand of `tools.bench` is a file with `add_arguments(parser)` and `run(args) ->
report`."""
