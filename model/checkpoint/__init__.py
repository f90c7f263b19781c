"""Checkpoints: which bytes of which file are which weights, and how they get into a model and out of one.

safetensors.py  the file format's header, checked before anything in it is believed
files.py        which files of a folder are the checkpoint
names.py        tables: what each exporter calls Mixtral's tensors
layout.py       headers against tables: every tensor accounted for, as a list of byte ranges
native.py       our own quantized checkpoints: which file holds what, and how they say so
foreign.py      what other programs' checkpoints look like, to name them in a refusal
load.py         reading those ranges straight into a model
writer.py       writing a safetensors file tensor by tensor
save.py         a model in plain HF layout, by the same tables
"""

from model.checkpoint.load import Checkpoint, open_checkpoint
from model.checkpoint.save import save_hf

__all__ = ["Checkpoint", "open_checkpoint", "save_hf"]
