"""Export to ONNX files and run them with ONNX Runtime."""
