from runtime.shell.command import launch

launch("tools.bench.command")
