"""TensorRT engines: built, refitted and run."""
