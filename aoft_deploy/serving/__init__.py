"""Artefacts and fleets over HTTP in the Open Inference Protocol v2. Needs no torch."""
