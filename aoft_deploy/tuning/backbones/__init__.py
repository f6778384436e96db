"""The frozen timm model: created, given its weights, and identified."""
