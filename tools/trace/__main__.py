from runtime.shell.command import launch

launch("tools.trace.command")
