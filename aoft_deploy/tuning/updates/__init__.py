"""The kinds of update: each has one formula, which is applied, folded, or mixed per sample."""
