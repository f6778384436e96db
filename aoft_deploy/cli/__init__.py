"""The commands: each module has ``main(argv)`` and imports what is heavy after parsing."""
