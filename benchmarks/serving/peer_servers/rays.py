"""Ray Serve with a small ONNX model: python rays.py MODEL PORT {noop,tiny}."""

import json
import sys

import numpy as np
import onnxruntime

try:
    import ray
    from ray import serve
    from starlette.requests import Request
except ModuleNotFoundError:
    raise SystemExit("Ray Serve is not installed: pip install 'ray[serve]'") from None

PATH, PORT, KIND = sys.argv[1], int(sys.argv[2]), sys.argv[3]


@serve.deployment(max_ongoing_requests=256)
class Model:
    """The model with Ray's batching, or no computation at all."""

    def __init__(self, path: str, kind: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session, self.kind = onnxruntime.InferenceSession(path, options), kind

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
    async def batched(self, rows: list[list[float]]) -> list[list[float]]:
        """Logits of a batch of requests."""
        images = np.asarray(rows, np.float32).reshape(-1, 3, 2, 2)
        return self.session.run(None, {"pixel_values": images})[0].tolist()

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        """Answer a request."""
        row = json.loads(await request.body())["data"]
        return {"data": [0.0] * 10 if self.kind == "noop" else await self.batched(row)}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Model.bind(PATH, KIND), route_prefix="/predict")
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
