"""Checkpoints: which bytes of which file are which weights, and how they get into a model and out of one.

safetensors.py  reads a file's header, and checks everything in it
files.py        finds the files of a folder that are the checkpoint
foreign.py      recognizes other programs' checkpoints, so that a refusal can name them
names.py        tables of what each exporter calls Mixtral's tensors
pieces.py       compares headers with tables, and lists the byte ranges of every parameter
native.py       does the same for our own quantized checkpoints
load.py         reads those ranges straight into a model
mapped.py       takes them as memory instead, without reading
identity.py     tells a model from all others
writer.py       writes a safetensors file tensor by tensor
save.py         writes a model in HF's layout, by the same tables
"""

from model.checkpoint.identity import Identity, identify
from model.checkpoint.load import Checkpoint, open_checkpoint
from model.checkpoint.mapped import MappedFiles
from model.checkpoint.save import save_hf

__all__ = ["Checkpoint", "Identity", "MappedFiles", "identify", "open_checkpoint", "save_hf"]
