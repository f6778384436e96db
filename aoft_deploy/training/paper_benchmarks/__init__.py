"""The benchmarks of the papers, VTAB-1k and FGVC: recipes, runs and tables."""
