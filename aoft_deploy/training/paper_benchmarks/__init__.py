"""The papers' benchmarks: VTAB-1k and FGVC, their recipes, runs and tables."""
