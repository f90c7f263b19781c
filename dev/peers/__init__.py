"""The same work done by other programs, to compare with."""
