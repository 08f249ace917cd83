"""A language model behind the OpenAI API, with no code of one's own.

    sllm deploy examples/counting/app.py
    curl -N localhost:8700/v1/chat/completions -H 'content-type: application/json' -d '{
        "model": "counting", "stream": true, "max_tokens": 10,
        "messages": [{"role": "user", "content": "41 42 43"}]}'

streams " 44", " 45", " 46" … one number per event. Say "roll:" and it rolls a die instead; the same `seed` rolls the
same numbers. When nobody calls, its instances stop after `scaledown_window` seconds (few, so that
you can watch it); the next call starts one.
"""

from __future__ import annotations

from pathlib import Path

import sllm

app = sllm.App("counting")

counting = app.llm("counting", checkpoint=Path(__file__).parent / "model", concurrency=8, scaledown_window=5)
