"""What `tools.trace` is made of: one concept per file."""
