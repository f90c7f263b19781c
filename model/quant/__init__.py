"""Weights at 8, 4, 3 and 2 bits.

`spec` names a format. `packing` says how codes become bytes, `streams` where the bytes of matrices, experts
and models go, and `size` adds them up. `tensor` is a quantized matrix, and `solve` makes one (HQQ). `product`
multiplies with one, `expert` computes with an expert, and `backends` are the ways to do that. docs/formats.md
describes the files.
"""
