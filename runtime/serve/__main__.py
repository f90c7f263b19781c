"""`python -m runtime.serve`. What it does is in `runtime.serve.command`."""

from runtime.shell.command import launch

if __name__ == "__main__":
    launch("runtime.serve.command")
