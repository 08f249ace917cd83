"""LitServe with the same echo; its own defaults for one CPU worker."""

import sys
from typing import Any

import litserve


class Echo(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["value"])

    def predict(self, x: str) -> str:
        return x

    def encode_response(self, output: str) -> str:
        return output


if __name__ == "__main__":
    litserve.LitServer(Echo(), accelerator="cpu", workers_per_device=1).run(
        port=int(sys.argv[1]), host="127.0.0.1", log_level="error", generate_client_file=False
    )
