"""The frozen timm model: how it is created, filled with weights, and identified."""
