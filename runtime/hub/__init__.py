"""Models by their names at the Hugging Face hub: `org/name`, `org/name@revision`.

names.py     what a name means
remote.py    what the hub says of a model
fetching.py  a file, downloaded so that a later run goes on where this one ended
ranges.py    the same for parts of a file
headers.py   headers of its weight files
at_once.py   several downloads, which end together
needed.py    which of a model's files are needed
cache.py     the Hugging Face cache: what it holds, and how it gets more
opening.py   a model's name to its folder, or to its headers
errors.py    one line for whatever can go wrong

Nothing here imports `huggingface_hub` before a name has to be looked up.
"""
