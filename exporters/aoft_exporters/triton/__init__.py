"""Export to model folders of a Triton repository, with ONNX or a TensorRT plan."""
