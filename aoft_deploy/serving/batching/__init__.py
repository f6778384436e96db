"""Requests collected into batches for an engine."""
