"""Pre-train the bundled base `nano` from a plain-text corpus, resumably, on CPU or GPU.

What it does: trains a byte-level BPE, tokenises the corpus once into a memory map, trains a GPT-2 with Muon (hidden
matrices) and AdamW (embeddings, norms, biases) on a constant rate that falls linearly to zero over the last quarter,
and exports a Hugging Face folder in float16. Until the decay, sequences are half as long: attention costs less, and
the last quarter is enough to learn the far positions (sequence-length warm-up, Li et al. 2022, arXiv:2108.06084).
It gives up nothing but generality: one model, one corpus, one process.

    python tools/pretrain_nano.py --corpus ../shared/data/corpus --work build/nano --out lora_gpt2/bases/nano

Interrupt it at any time and run the same command again: it goes on from the newest checkpoint, with the data in the
same order. `--tokens` may be changed between runs to bring the final decay forward or put it off. Every setting and
the seed are recorded in the checkpoint and in the exported `training.json`.

Sources: Muon, Jordan et al. 2024 (`torch.optim.Muon`, learning rates matched to AdamW's RMS, Liu et al. 2025,
arXiv:2502.16982); the constant-then-decay schedule, Hu et al. 2024 (arXiv:2404.06395).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

EOS = "<|endoftext|>"
SETTINGS: dict[str, Any] = {
    "vocab_size": 8192,
    "context": 512,
    "width": 192,
    "layers": 6,
    "heads": 3,
    "batch_sequences": 24,
    "short_context": 256,
    "muon_learning_rate": 4e-3,
    "adamw_learning_rate": 4e-3,
    "weight_decay": 0.05,
    "warmup_steps": 100,
    "decay_share": 0.25,
    "clip": 1.0,
    "head_rows": 512,
    "seed": 1729,
}

PROMPTS = ("The king of the country", "She opened the door and", "In this section we will learn how to")
CARD = """# nano

The base that ships with lora-gpt2: a GPT-2 (Radford et al. 2019) small enough for any machine, for trying things out,
tests and demonstrations. Any tool that loads a GPT-2 loads this folder.

| | |
|---|---|
| parameters | {parameters:,} ({layers} layers, width {width}, {heads} heads, tied head), stored as float16 |
| vocabulary | {vocab_size:,} tokens, byte-level BPE of its own; `<|endoftext|>` is the last |
| context | {context} tokens |
| tokens seen | {tokens_seen:,}, {epochs:.2f} of one pass over the {corpus_tokens:,} of its corpus |
| validation | perplexity {perplexity:.2f} per token, {bits_per_byte:.4f} bits per byte, on `general_valid.txt` ({tokens:,} tokens, {bytes:,} bytes), each document on its own in windows of {context} without overlap |
| training | {steps:,} steps, {seconds:,.0f} s, float32 |

Made by `tools/pretrain_nano.py`; every setting and the seed are in `training.json`.

## Data

A corpus of general English in a fixed random order: books of Project Gutenberg (public domain in the U.S.), OpenStax
text books (CC BY 4.0), arXiv abstracts (CC0), documentation of Python (PSF-2.0), SQLite (public domain), Apache httpd
(Apache-2.0) and the Rust book (MIT/Apache-2.0), pages of the U.S. General Services Administration and the CIA World
Factbook (public domain / CC0), State of the Union addresses (public domain). The weights are under Apache-2.0 like the
package; OpenStax is to be credited: "Access for free at openstax.org".

## Samples

Temperature 0.7, top-k 50, top-p 0.95, seed 0, the first draw of each:

{samples}

## Limits

It writes recognisable English and knows next to nothing. It has seen few tokens for its size; more would make it better.
It repeats itself, states false things, and carries the bias of old books. Not for any use but learning and testing.
"""  # noqa: E501


def read_documents(corpus: Path) -> Iterator[str]:
    """Yields the documents of `general.txt.gz`, each of which ends with a line holding only EOS."""
    lines: list[str] = []
    with gzip.open(corpus / "general.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            if line.rstrip("\n") == EOS:
                yield "".join(lines).strip("\n")
                lines = []
            else:
                lines.append(line)
    if lines:
        yield "".join(lines).strip("\n")


def build_tokenizer(corpus: Path, work: Path) -> ByteLevelBPETokenizer:
    """Trains the vocabulary once; EOS gets the last id, as in GPT-2, and is never matched inside text."""
    vocab, merges = work / "vocab.json", work / "merges.txt"
    if not vocab.exists():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(read_documents(corpus), vocab_size=SETTINGS["vocab_size"] - 1, min_frequency=2)
        tokenizer.save_model(str(work))
    return ByteLevelBPETokenizer(str(vocab), str(merges))


def build_tokens(corpus: Path, work: Path) -> np.ndarray:
    """Tokenises the corpus once; returns a uint16 memory map `[num_tokens]`, documents each followed by EOS."""
    path = work / "train.bin"
    if not path.exists():
        tokenizer, eos = build_tokenizer(corpus, work), SETTINGS["vocab_size"] - 1
        partial = path.with_suffix(".partial")
        with partial.open("wb") as out:
            batch: list[str] = []
            for document in read_documents(corpus):
                batch.append(document)
                if len(batch) == 256:
                    write_batch(tokenizer, batch, eos, out)
                    batch = []
            write_batch(tokenizer, batch, eos, out)
        os.replace(partial, path)
    return np.memmap(path, dtype=np.uint16, mode="r")


def write_batch(tokenizer: ByteLevelBPETokenizer, batch: list[str], eos: int, out: Any) -> None:
    """Appends each document's tokens and an EOS to `out` as uint16."""
    for encoding in tokenizer.encode_batch(batch):
        np.array([*encoding.ids, eos], dtype=np.uint16).tofile(out)


def build_model() -> GPT2LMHeadModel:
    """Returns a fresh GPT-2 of the set size, without dropout, with the residual projections scaled by depth."""
    eos = SETTINGS["vocab_size"] - 1
    config = GPT2Config(
        vocab_size=SETTINGS["vocab_size"],
        n_positions=SETTINGS["context"],
        n_embd=SETTINGS["width"],
        n_layer=SETTINGS["layers"],
        n_head=SETTINGS["heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=eos,
        eos_token_id=eos,
        use_cache=False,
    )
    torch.manual_seed(SETTINGS["seed"])
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    other = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    decayed = [p for p in other if p.ndim == 2]
    plain = [p for p in other if p.ndim < 2]
    muon = torch.optim.Muon(
        hidden,
        lr=SETTINGS["muon_learning_rate"],
        weight_decay=SETTINGS["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=SETTINGS["adamw_learning_rate"], betas=(0.9, 0.95), fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def rate_at(step: int, num_steps: int) -> float:
    """The share of the peak learning rate at `step`: warm-up, constant, then linear to zero."""
    decay_steps = max(1, int(num_steps * SETTINGS["decay_share"]))
    return min(1.0, (step + 1) / SETTINGS["warmup_steps"], max(0.0, (num_steps - step) / decay_steps))


def is_decaying(step: int, num_steps: int) -> bool:
    """True in the last part of the run, where the rate falls and the sequences have their full length."""
    return num_steps - step < int(num_steps * SETTINGS["decay_share"])


def compute_gradients(trunk: Any, head: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Adds the gradients of the mean loss; the head runs in chunks of rows, so its logits stay in the cache.

    `inputs`, `targets`: `[batch, time]`. Returns the loss in nats per token.
    """
    hidden = trunk(inputs).flatten(0, 1)
    total, gradients = 0.0, []
    chunks = zip(hidden.split(SETTINGS["head_rows"]), targets.flatten().split(SETTINGS["head_rows"]), strict=True)
    for rows, wanted in chunks:
        leaf = rows.detach().requires_grad_()
        loss = F.cross_entropy(F.linear(leaf, head), wanted, reduction="sum") / targets.numel()
        loss.backward()
        total += loss.item()
        gradients.append(leaf.grad)
    hidden.backward(torch.cat(gradients))
    return total


@torch.no_grad()
def measure_validation(model: GPT2LMHeadModel, corpus: Path, work: Path, max_bytes: int | None) -> dict[str, float]:
    """Perplexity and bits per byte on `general_valid.txt`: each document on its own, windows of the context length."""
    text = (corpus / "general_valid.txt").read_text(encoding="utf-8")
    tokenizer, eos = build_tokenizer(corpus, work), SETTINGS["vocab_size"] - 1
    nll, num_tokens, num_bytes = 0.0, 0, 0
    for document in text.split(EOS):
        document = document.strip("\n")
        if not document or (max_bytes is not None and num_bytes >= max_bytes):
            continue
        ids = torch.tensor([eos, *tokenizer.encode(document).ids], device=model.device)
        for start in range(0, len(ids) - 1, SETTINGS["context"]):
            window = ids[start : start + SETTINGS["context"] + 1][None]
            logits = model(window[:, :-1]).logits[0].float()
            nll += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        num_tokens += len(ids) - 1
        num_bytes += len(document.encode())
    return {
        "nll_nats_per_token": nll / num_tokens,
        "perplexity": math.exp(nll / num_tokens),
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "tokens": num_tokens,
        "bytes": num_bytes,
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint as a whole; a kill leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace) -> None:
    """Trains until `args.tokens` tokens have been seen (0: one epoch), then exports."""
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = build_tokens(args.corpus, args.work)
    model, device = build_model(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizers = build_optimizers(model)
    step, seen, seconds, checkpoint = 0, 0, 0.0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != SETTINGS:
            raise SystemExit(f"{checkpoint} was made with other settings: {state['settings']}; use another --work")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, seconds = state["step"], state["seen"], state["seconds"]
        print(f"resuming at step {step}", flush=True)

    context, batch = SETTINGS["context"], SETTINGS["batch_sequences"]
    num_windows = (len(tokens) - 1) // context
    budget = args.tokens or num_windows * context
    num_steps = budget // (context * batch)
    trunk = torch.compile(lambda ids: model.transformer(ids, use_cache=False).last_hidden_state)
    last_save = last_log = time.monotonic()
    while step < num_steps:
        epoch, offset = divmod(step * batch, num_windows)
        order = np.random.default_rng(SETTINGS["seed"] + epoch).permutation(num_windows)
        rows = [int(order[(offset + i) % num_windows]) * context for i in range(batch)]
        block = torch.from_numpy(np.stack([tokens[r : r + context + 1] for r in rows]).astype(np.int64)).to(device)
        started = time.monotonic()
        width = context if is_decaying(step, num_steps) else SETTINGS["short_context"]
        inputs, targets = block[:, :-1].reshape(-1, width), block[:, 1:].reshape(-1, width)
        loss = compute_gradients(trunk, model.lm_head.weight, inputs, targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, num_steps)
            optimizer.step()
            optimizer.zero_grad()
        now = time.monotonic()
        step, seen, seconds = step + 1, seen + block.shape[0] * context, seconds + now - started
        record: dict[str, Any] = {"step": step, "tokens": seen, "loss": round(loss, 4), "seconds": round(seconds, 1)}
        if step % args.validate_every == 0:
            model.eval()
            record["validation"] = measure_validation(model, args.corpus, args.work, max_bytes=100_000)
            model.train()
        with (args.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        if now - last_log > 20:
            left = (num_steps - step) * seconds / step / 60
            print(
                f"step {step}/{num_steps} loss {loss:.3f} {seen / seconds:,.0f} tokens/s {left:.0f} min left",
                flush=True,
            )
            last_log = now
        if now - last_save > args.save_minutes * 60 or step == num_steps:
            save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "seen": seen,
                    "seconds": seconds,
                    "settings": SETTINGS,
                },
            )
            last_save = now
    export(model, args, {"steps": step, "tokens_seen": seen, "corpus_tokens": len(tokens), "seconds": seconds})


def export(model: GPT2LMHeadModel, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes the Hugging Face folder in float16 and measures what was written, not what was trained."""
    from transformers import GPT2TokenizerFast

    args.out.mkdir(parents=True, exist_ok=True)
    model.eval().cpu()
    model.config.activation_function = "gelu_new"  # the same formula under GPT-2's own name
    model.config.use_cache = True
    model.half().save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    (args.out / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    tokenizer = GPT2TokenizerFast(
        vocab=str(args.work / "vocab.json"),
        merges=str(args.work / "merges.txt"),
        unk_token=EOS,
        bos_token=EOS,
        eos_token=EOS,
        model_max_length=SETTINGS["context"],
        add_prefix_space=False,
    )
    tokenizer.save_pretrained(args.out)
    tokenizer.backend_tokenizer.model.save(str(args.out))
    written = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).eval()
    figures["validation"] = measure_validation(written, args.corpus, args.work, max_bytes=None)
    figures["epochs"] = figures["tokens_seen"] / figures["corpus_tokens"]
    figures["parameters"] = sum(p.numel() for p in written.parameters())
    (args.out / "training.json").write_text(json.dumps({"settings": SETTINGS, "figures": figures}, indent=2) + "\n")
    card = CARD.format(**SETTINGS, **figures, **figures["validation"], samples=draw_samples(written, args.work))
    (args.out / "CARD.md").write_text(card, encoding="utf-8")
    print(json.dumps(figures, indent=2))


def draw_samples(model: GPT2LMHeadModel, work: Path) -> str:
    """Continues each prompt once with a fixed seed and the product's default sampling."""
    tokenizer = ByteLevelBPETokenizer(str(work / "vocab.json"), str(work / "merges.txt"))
    parts = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=50, top_p=0.95, max_new_tokens=60
        )
        text = tokenizer.decode([token for token in out[0].tolist() if token != model.config.eos_token_id])
        parts.append("> " + text.strip().replace("\n", "\n> "))
    return "\n\n".join(parts)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with general.txt.gz and general_valid.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, log and checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to train on (0: one epoch)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validate-every", type=int, default=250, help="steps between validations")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
