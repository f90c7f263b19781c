"""How the kernel of attention finds keys and values. See `attention` and `rowwise`."""

ROW = ("keys", "values", "stride", "length")  # of a row: addresses, bytes from group to group, tokens it sees
BFLOAT16, FLOAT16 = 16, 17  # dtypes, in place of a format's bits
