"""Export for PyTorch: merged timm models, compiled packages and PEFT adapters."""
