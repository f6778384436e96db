"""The URLs of the server and their answers."""
