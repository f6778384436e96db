"""The kinds of update: one formula each, applied, folded or mixed."""
