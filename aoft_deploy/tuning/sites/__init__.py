"""Places of a model that take updates, found by role."""
