"""The Open Inference Protocol v2: parsing requests, formatting answers, HTTP errors."""
