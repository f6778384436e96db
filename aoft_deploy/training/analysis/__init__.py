"""What training did to the weights: angles, norms, orthogonality, and their plots."""
