"""A BentoML service of a small ONNX model, configured by the environment: MODEL and KIND."""

import os

import numpy as np
import onnxruntime

try:
    import bentoml
except ModuleNotFoundError:
    raise SystemExit("BentoML is not installed: pip install bentoml") from None

PATH, KIND = os.environ["MODEL"], os.environ["KIND"]


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, traffic={"timeout": 30})
class Model:
    """The model with BentoML's batching, or no computation at all."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(PATH, options)

    if KIND == "noop":

        @bentoml.api
        def predict(self, data: list[float]) -> list[float]:
            """Answer without computing anything."""
            return [0.0] * 10

    else:

        @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=1000)
        def predict(self, data: list[list[float]]) -> list[list[float]]:
            """Logits of a batch of requests."""
            images = np.asarray(data, np.float32).reshape(-1, 3, 2, 2)
            return self.session.run(None, {"pixel_values": images})[0].tolist()
