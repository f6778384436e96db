"""The view How it works: what training changed, and measured results."""
