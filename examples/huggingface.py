"""A model from the Hugging Face hub; needs the network the first time.

    sllm deploy examples/huggingface.py     # downloads about 1 GB once, with a progress bar
    curl -N localhost:8700/v1/chat/completions -H 'content-type: application/json' -d '{
        "model": "qwen", "stream": true, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

streams an answer in words. The revision is pinned to what the name means on the day of the deployment: the checkpoint
is stored under its digest, and no later call looks at the network. For a private repository set HF_TOKEN where the
server runs.
"""

from __future__ import annotations

import sllm

app = sllm.App("qwen")

qwen = app.llm("qwen", checkpoint=sllm.Checkpoint("Qwen/Qwen2.5-0.5B-Instruct"), scaledown_window=300)
