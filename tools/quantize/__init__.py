"""`python -m tools.quantize`: a checkpoint in fewer bits."""
