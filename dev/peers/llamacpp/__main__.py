from runtime.shell.command import launch

launch("dev.peers.llamacpp.command")
