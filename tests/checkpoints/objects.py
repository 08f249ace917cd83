"""Checkpoint objects made of random bytes: real manifests, no model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import xxhash
from sllm_invoker.checkpoints.object import (
    CHUNK_BYTES,
    DATA_ALIGNMENT,
    FORMAT_VERSION,
    CheckpointObject,
    Layout,
    Manifest,
    Part,
    Source,
    TensorEntry,
    identity,
    open_object,
    write_manifest,
)


def make_object(root: Path, seed: int, size: int) -> CheckpointObject:
    """An object of about `size` bytes under `root`/objects, different for every seed."""
    data = random.Random(seed).randbytes(1 << 16) * (size >> 16)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}})
    raw = header.ljust(DATA_ALIGNMENT - 8).encode()
    content = len(raw).to_bytes(8, "little") + raw + data
    chunks = [xxhash.xxh3_64_hexdigest(content[i : i + CHUNK_BYTES]) for i in range(0, len(content), CHUNK_BYTES)]
    tensor = TensorEntry("w", "U8", (len(data),), 0, len(data))
    part = Part("part-0-of-1.safetensors", len(content), DATA_ALIGNMENT, f"{seed}", tuple(chunks), (tensor,), ())
    layout = Layout(1, "0", "uint8")
    digest = identity(layout, (part,), (), "")
    manifest = Manifest(
        format=FORMAT_VERSION, digest=digest, source=Source(f"seed-{seed}", ""), layout=layout, architecture="None",
        parts=(part,), ties={}, files=(), parameters=len(data), total_bytes=len(content),
        kv_bytes_per_token=0, max_context=1, vocabulary=1, generates=False, batched=False, chat_template=False,
    )  # fmt: skip
    directory = root / "objects" / digest
    directory.mkdir(parents=True)
    (directory / part.name).write_bytes(content)
    write_manifest(directory, manifest)
    return open_object(directory)


def checksum(checkpoint: CheckpointObject) -> str:
    return xxhash.xxh3_64_hexdigest(checkpoint.part_path().read_bytes())
