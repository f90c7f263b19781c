"""Weights at 8, 4, 3 and 2 bits: how they are chosen (HQQ), stored, and how many bytes they take.

`spec` names a format; `packing` lays out codes, `layout` whole tensors and experts, `size` adds up models;
`tensor` is a quantized matrix, and `solve` makes one. The formats are described in docs/formats.md.
"""
