"""A demo in the browser: many tasks on one backbone."""
