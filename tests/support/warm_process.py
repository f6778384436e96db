"""Imported by the process from which ``forked`` forks: what its children need is then there."""

from warm import trace_once

trace_once()
