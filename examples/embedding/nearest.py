"""Asks the embedding model of `app.py` how near texts are to the first one, with the official client.

    pip install openai
    python examples/embedding/nearest.py "40 44" 42 50 500 "a red cat"

SLLM_URL says where the platform is (default http://127.0.0.1:8700), SLLM_TOKEN the token if it wants one.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(first: str, *others: str) -> None:
    url = os.environ.get("SLLM_URL", "http://127.0.0.1:8700")
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SLLM_TOKEN", "none"))
    answer = client.embeddings.create(model="embedding", input=[first, *others])
    place, *places = (one.embedding for one in answer.data)
    nearness = (sum(a * b for a, b in zip(place, other, strict=True)) for other in places)
    for near, text in sorted(zip(nearness, others, strict=True), reverse=True):
        print(f"{near:5.3f}  {text}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
