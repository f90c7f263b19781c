from runtime.shell.command import launch

launch("tools.quantize.command")
