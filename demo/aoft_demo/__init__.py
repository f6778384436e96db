"""The demo: many tasks on one backbone, live in a browser."""
