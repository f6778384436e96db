"""Artefacts of a server: found in files, opened, replaced and closed."""
