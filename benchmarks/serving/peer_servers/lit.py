"""A LitServe server of a small ONNX model: python lit.py MODEL PORT {noop,tiny}."""

import sys

import numpy as np
import onnxruntime

try:
    import litserve
except ModuleNotFoundError:
    raise SystemExit("LitServe is not installed: pip install litserve") from None

PATH, PORT, KIND = sys.argv[1], int(sys.argv[2]), sys.argv[3]


class Model(litserve.LitAPI):
    """The model with LitServe's batching, or no computation at all."""

    def setup(self, device):
        """Open the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(PATH, options)

    def decode_request(self, request):
        """Inputs of a request."""
        return np.asarray(request["data"], np.float32).reshape(3, 2, 2)

    def predict(self, x):
        """Logits."""
        if KIND == "noop":
            return np.zeros(10, np.float32)
        return self.session.run(None, {"pixel_values": np.asarray(x)})[0]

    def encode_response(self, output):
        """Convert logits to JSON."""
        return {"data": output.tolist()}


if __name__ == "__main__":
    batching = {} if KIND == "noop" else {"max_batch_size": 16, "batch_timeout": 0.002}
    server = litserve.LitServer(Model(**batching), accelerator="cpu")
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
