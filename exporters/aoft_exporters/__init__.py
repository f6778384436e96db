"""Back ends that merged models are exported to. Each module has the same verbs.

``SUFFIX``, ``TOLERANCE`` and ``PRECISIONS``; ``export(model, path, spec)`` writes one file;
``load(path) -> Engine`` runs it.
"""
