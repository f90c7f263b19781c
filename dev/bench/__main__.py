from runtime.shell.command import launch

launch("dev.bench.command")
