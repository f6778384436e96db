"""ONNX graphs of models: traced, cached, and lowered."""
