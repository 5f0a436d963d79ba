"""From blocks back to documents: for a look at what training sees, and for the clean text itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.blocks import TokenBlocks
from lora_gpt2.data.prepared import SPLITS, PreparedData
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.tokenizer import Tokenizer

PREVIEW_TOKENS = 200


def iter_documents(blocks: TokenBlocks, eos_id: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Yields a split's documents (a packed split's sequences): token ids without EOS, and the loss mask."""
    if blocks.sequence_offsets is not None:
        runs = pairwise(blocks.sequence_offsets.tolist())
        bounds = [(begin, end - int(blocks.stream[end - 1] == eos_id)) for begin, end in runs]  # a cut one has no EOS
    else:
        ends = np.flatnonzero(np.asarray(blocks.stream) == eos_id).tolist()
        bounds = list(pairwise(ends))
    for begin, end in bounds:
        ids = blocks.stream[begin + 1 : end].tolist()
        has_loss = [True] * len(ids) if blocks.loss is None else (blocks.loss[begin + 1 : end] > 0).tolist()
        yield ids, has_loss


def list_documents(prepared: PreparedData, split: str, tokenizer: Tokenizer) -> list[Document]:
    """Returns the documents of a split as text, each with its part without loss as its prompt."""
    found = []
    for number, (ids, has_loss) in enumerate(iter_documents(getattr(prepared, split), tokenizer.eos_id), start=1):
        prompt = has_loss.index(True) if True in has_loss else len(ids)
        found.append(Document(tokenizer.decode(ids[prompt:]), f"{split}#{number}", tokenizer.decode(ids[:prompt])))
    return found


def preview_documents(blocks: TokenBlocks, tokenizer: Tokenizer, count: int) -> list[list[dict[str, Any]]]:
    """Returns the first documents as tokens: `text`, `id`, and whether it has `loss`; at most `PREVIEW_TOKENS`."""
    return [
        [
            {"text": tokenizer.decode([token]), "id": token, "loss": loss}
            for token, loss in islice(zip(ids, has_loss, strict=True), PREVIEW_TOKENS)
        ]
        for ids, has_loss in islice(iter_documents(blocks, tokenizer.eos_id), count)
    ]


def write_texts(prepared: PreparedData, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the clean documents of each split to `train.jsonl`, `validation.jsonl` and `test.jsonl`.

    Raises `UsageError` for packed blocks, which may have cut a document.
    """
    if prepared.train.sequence_offsets is not None:
        raise UsageError("packed blocks have no whole documents to write", "use --set data.layout=concat with --text")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for ids, has_loss in iter_documents(getattr(prepared, split), tokenizer.eos_id):
                prompt = has_loss.index(True) if True in has_loss else len(ids)
                record = {"prompt": tokenizer.decode(ids[:prompt]), "completion": tokenizer.decode(ids[prompt:])}
                shown = record if prompt else {"text": record["completion"]}
                file.write(json.dumps(shown, ensure_ascii=False) + "\n")
