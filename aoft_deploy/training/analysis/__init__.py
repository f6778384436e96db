"""Analysis of trained weights: angles, norms, deviation from orthogonality, and plots."""
