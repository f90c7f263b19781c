"""How the kernel of attention finds keys and values. See `attention` and `rowwise`."""

# Of a row: addresses, bytes from group to group of keys, tokens it sees. Only codes have scales.
ROW = ("keys", "values", "key_scales", "value_scales", "stride", "length")
CODES, BFLOAT16, FLOAT16 = 8, 16, 17  # what keys and values are, in place of a format's bits
