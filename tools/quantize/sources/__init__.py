"""What `tools.quantize` takes models from. Each kind is one file, and all of them keep to one protocol.

source.py      the protocol, and the files of a model
opening.py     tells which kind a model is
hub.py         models at the Hugging Face hub, of which only a part is ever on the disk
folder.py      16- or 32-bit checkpoints in HF's or Mistral's layout
offloading.py  the checkpoint of mixtral-offloading
hqq.py         what the package hqq saves
gguf.py        llama.cpp's format, with gguf_header.py, gguf_files.py, gguf_types.py, gguf_config.py and
               gguf_tokenizer.py
stored.py      what sources of safetensors files share
"""
