"""The models of a server: found on disk, opened, and replaced while it runs."""
