"""Parts of `tools.quantize`: the journal of a run, and the folder that it writes."""
