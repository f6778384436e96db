"""The fleet that is shown, and each visitor's own tasks in it."""
