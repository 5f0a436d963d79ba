"""Builds what tests need, small: bases in Hugging Face's format, adapters with an effect, text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_gpt2.data.tokenizer import byte_alphabet
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter, LoraUpdate, build_adapter
from lora_gpt2.recipe import LoraSettings

MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("e", "r")]


def make_base_folder(
    folder: Path,
    layers: int = 2,
    width: int = 16,
    heads: int = 2,
    context: int = 48,
    tied: bool = True,
    seed: int = 0,
    shards: int = 1,
    prefix: str = "transformer.",
) -> Path:
    """Writes a random GPT-2 with a byte-level tokenizer, as transformers would save it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: index for index, symbol in enumerate(byte_alphabet())}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "model_type": "gpt2",
        "vocab_size": len(vocab),
        "n_positions": context,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "activation_function": "gelu_new",
        "eos_token_id": len(vocab) - 1,
        "bos_token_id": len(vocab) - 1,
        "tie_word_embeddings": tied,
        "architectures": ["GPT2LMHeadModel"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = random_tensors(layers, width, len(vocab), context, seed, prefix)
    if not tied:
        tensors["lm_head.weight"] = torch.randn(len(vocab), width, generator=torch.Generator().manual_seed(9)) * 0.3
    write_shards(folder, tensors, shards)
    return folder


def random_tensors(
    layers: int, width: int, vocab: int, context: int, seed: int, prefix: str
) -> dict[str, torch.Tensor]:
    """Returns weights large enough that every part matters, in Conv1D's `[in, out]` layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {"wte.weight": draw(vocab, width), "wpe.weight": draw(context, width)}
    for layer in range(layers):
        for norm in ("ln_1", "ln_2"):
            tensors[f"h.{layer}.{norm}.weight"] = 1 + draw(width)
            tensors[f"h.{layer}.{norm}.bias"] = draw(width)
        shapes = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": 4 * width}
        for name, out in shapes.items():
            tensors[f"h.{layer}.{name}.weight"] = draw(width, out)
            tensors[f"h.{layer}.{name}.bias"] = draw(out)
        tensors[f"h.{layer}.mlp.c_proj.weight"] = draw(4 * width, width)
        tensors[f"h.{layer}.mlp.c_proj.bias"] = draw(width)
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, context, context).tril()
    tensors["ln_f.weight"], tensors["ln_f.bias"] = 1 + draw(width), draw(width)
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Writes one file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(config: GPT2Config, seed: int = 1, settings: LoraSettings | None = None) -> Adapter:
    """Returns an adapter whose B is not zero, so that it has an effect."""
    fresh = build_adapter(config, settings or LoraSettings(rank=4, alpha=8), seed)
    generator = torch.Generator().manual_seed(seed + 100)
    return Adapter(
        updates={
            site: LoraUpdate(u.a, torch.randn(u.b.shape, generator=generator) * 0.2, u.alpha, u.use_rslora)
            for site, u in fresh.updates.items()
        }
    )


def make_text(
    documents: int, seed: int = 0, words: str = "the cat and the dog run in the rain under another sun"
) -> str:
    """Returns JSON lines of short random sentences."""
    generator = random.Random(seed)
    rows = (" ".join(generator.choices(words.split(), k=generator.randint(6, 20))) for _ in range(documents))
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def train_and_save(wrapped, tokens, folder) -> None:
    """Trains a PEFT model for three steps, so that its adapter has an effect, and saves it."""
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval().save_pretrained(folder)
