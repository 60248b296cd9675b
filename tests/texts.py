"""Text for tests, and tokenizers of it."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path


class Bytes:
    """A tokenizer of bytes; 256 ends a text, and begins one where `begins` says so."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 256

    def __init__(self, begins: tuple[int, ...] = ()) -> None:
        self.begins = begins

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [*(self.begins if add_special_tokens else ()), *text.encode()]}


class Endless(Bytes):
    eos_token_id = None


def jsonl(path: Path, texts: Sequence[str | None]) -> str:
    """Write lines of JSON; returns the path."""
    data = "".join(json.dumps({"text": t, "more": 1}) + "\n" for t in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)
