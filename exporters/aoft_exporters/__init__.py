"""Exporters, one package for each runtime.

Each exporter module defines ``export``, ``load`` and ``describe`` and collects them in a value
``EXPORTER``. Entry points of the group ``aoft_deploy.exporters`` name these values.
"""
