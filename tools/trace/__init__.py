"""`python -m tools.trace`: what a trace of the expert cache says."""
