"""The Mixtral network in PyTorch: configuration, forward pass, KV cache, and the checkpoints that fill it.

Start reading at `model.mixtral`. Nothing here knows of the runtime that drives it.
"""
