"""ONNX graphs of models: traced, cached, lowered and converted to low precision."""
