"""Training the demo checkpoint, and judging how well it predicts text it has not seen."""
