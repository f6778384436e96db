"""Exported artefacts served over HTTP, in the Open Inference Protocol v2."""
