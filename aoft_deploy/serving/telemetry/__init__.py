"""Metrics and statistics of a server."""
