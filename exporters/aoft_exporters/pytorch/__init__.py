"""Weights for PyTorch: merged timm models and PEFT adapters."""
