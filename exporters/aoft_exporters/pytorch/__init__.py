"""Export weights for PyTorch: merged timm models and PEFT adapters."""
