"""Requests joined into batches for one engine."""
