"""Build, refit and run TensorRT engines."""
