from runtime.shell.command import launch

if __name__ == "__main__":
    launch("dev.soak.command")
