"""Pre-train a bundled base (`nano` or `mini`) from a plain-text corpus, resumably, on a CPU or a GPU.

What it does: trains a byte-level BPE, tokenises the corpus once, trains a GPT-2 with Muon (hidden matrices) and AdamW
(embeddings, norms, biases) on a constant rate that falls linearly to zero over the last quarter, and exports a Hugging
Face folder in float16. Until the decay, sequences are half as long: attention costs less, and the last quarter is
enough to learn the far positions (sequence-length warm-up, Li et al. 2022, arXiv:2108.06084). Products are in bfloat16
where the hardware has it, weights and optimizer states in float32. On a GPU forward and backward are recorded as CUDA
graphs, one for each length. It gives up nothing but generality: one model, one corpus, one process.

    python tools/pretrain.py --base nano --corpus ../shared/data/corpus --work build/nano --out lora_gpt2/bases/nano

Interrupt it at any time and run the same command again: it goes on from the newest checkpoint, with the data in the
same order. `--tokens` and `--minutes` end the run, whichever comes first, and may be changed between runs: the decay
follows the share of them that is spent. Every setting and the seed are in the checkpoint and in `training.json`.

`vocab.json` and `merges.txt` in `--work` are used where they are there: copy those of a base to keep its vocabulary
(and whatever was tokenised with it); `--prepare` makes them and stops. A machine that is lent for minutes, where 64 MiB
may be carried and files of 16 MiB come back:

    xz -9 -c <(zcat ../shared/data/corpus/general.txt.gz) > .carry/corpus/general.txt.xz    # 44 MB
    python tools/pretrain.py --base mini --corpus .carry/corpus --work .carry/mini --prepare && rm .carry/mini/train.bin
    # there:
    python3 tools/pretrain.py --base mini --corpus .carry/corpus --work .carry/mini --out /tmp/mini --minutes 4
    cp .carry/mini/log.jsonl /tmp/mini && split -b 15M <(tar c -C /tmp mini) $OUT/mini.tar.
    # here: cat mini.tar.* | tar x

Sources: Muon, Jordan et al. 2024 (`torch.optim.Muon`, learning rates matched to AdamW's RMS, Liu et al. 2025,
arXiv:2502.16982); the constant-then-decay schedule, Hu et al. 2024 (arXiv:2404.06395); passes over the same corpus,
Muennighoff et al. 2023 (arXiv:2305.16264).
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_gpt2.model.graphs import capture, on_capture_stream

EOS = "<|endoftext|>"
PROMPTS = ("The king of the country", "She opened the door and", "In this section we will learn how to")


@dataclass(frozen=True)
class Settings:
    """What decides the weights, besides the corpus and how long the training lasts. Lengths are in tokens."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    batch_sequences: int = 64
    muon_learning_rate: float = 4e-3
    adamw_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    decay_share: float = 0.25
    clip: float = 1.0
    seed: int = 1729

    @property
    def eos(self) -> int:
        """The id of `<|endoftext|>`, the last one as in GPT-2."""
        return self.vocab_size - 1


BASES = {
    "nano": Settings(vocab_size=8192, context=512, width=192, layers=6, heads=3),
    "mini": Settings(
        vocab_size=16384,
        context=1024,
        width=384,
        layers=9,
        heads=6,
        muon_learning_rate=3e-3,
        adamw_learning_rate=3e-3,
    ),
}
INTRODUCTIONS = {
    "nano": "The base that ships with lora-gpt2: a GPT-2 (Radford et al. 2019) small enough for any machine, for "
    "trying things\nout, tests and demonstrations.",
    "mini": "The larger base that ships with lora-gpt2: a GPT-2 (Radford et al. 2019) that a CPU trains adapters for "
    "in minutes,\nwith the context of the published sizes.",
}
CARD = """# {name}

{introduction} Any tool that loads a GPT-2 loads this folder.

| | |
|---|---|
| parameters | {parameters:,} ({layers} layers, width {width}, {heads} heads, tied head), stored as float16 |
| vocabulary | {vocab_size:,} tokens, byte-level BPE of its own; `<|endoftext|>` is the last |
| context | {context:,} tokens |
| tokens seen | {tokens_seen:,}, {epochs:.2f} passes over the {corpus_tokens:,} of its corpus |
| validation | perplexity {perplexity:.2f} per token, {bits_per_byte:.4f} bits per byte, on `general_valid.txt` ({tokens:,} tokens, {bytes:,} bytes), each document on its own in windows of {context:,} without overlap |
| training | {steps:,} steps, {seconds:,.0f} s, {precision} |

Made by `tools/pretrain.py`; every setting and the seed are in `training.json`.

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
    """Yields the documents of `general.txt.gz` (or `.xz`), each of which ends with a line holding only EOS."""
    packed = corpus / "general.txt.xz"
    module, path = (lzma, packed) if packed.exists() else (gzip, packed.with_suffix(".gz"))
    lines: list[str] = []
    with module.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.rstrip("\n") == EOS:
                yield "".join(lines).strip("\n")
                lines = []
            else:
                lines.append(line)
    if lines:
        yield "".join(lines).strip("\n")


def build_tokenizer(corpus: Path, work: Path, settings: Settings) -> ByteLevelBPETokenizer:
    """Trains the vocabulary once; EOS gets the last id, as in GPT-2, and is never matched inside text."""
    vocab, merges = work / "vocab.json", work / "merges.txt"
    if not vocab.exists():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(read_documents(corpus), vocab_size=settings.eos, min_frequency=2)
        tokenizer.save_model(str(work))
    return ByteLevelBPETokenizer(str(vocab), str(merges))


def build_tokens(corpus: Path, work: Path, settings: Settings) -> torch.Tensor:
    """Tokenises the corpus once; returns int16 `[num_tokens]`, documents each followed by EOS."""
    path = work / "train.bin"
    if not path.exists():
        tokenizer = build_tokenizer(corpus, work, settings)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as out:
            batch: list[str] = []
            for document in read_documents(corpus):
                batch.append(document)
                if len(batch) == 256:
                    write_batch(tokenizer, batch, settings.eos, out)
                    batch = []
            write_batch(tokenizer, batch, settings.eos, out)
        os.replace(partial, path)
    return torch.from_numpy(np.fromfile(path, dtype=np.int16))


def write_batch(tokenizer: ByteLevelBPETokenizer, batch: list[str], eos: int, out: Any) -> None:
    """Appends each document's tokens and an EOS to `out` as int16."""
    for encoding in tokenizer.encode_batch(batch):
        np.array([*encoding.ids, eos], dtype=np.int16).tofile(out)


def build_model(settings: Settings) -> GPT2LMHeadModel:
    """Returns a fresh GPT-2 of the set size, without dropout, with the residual projections scaled by depth."""
    config = GPT2Config(
        vocab_size=settings.vocab_size,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=settings.eos,
        eos_token_id=settings.eos,
        use_cache=False,
    )
    torch.manual_seed(settings.seed)
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    other = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    muon = torch.optim.Muon(
        hidden,
        lr=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [
        {"params": [p for p in other if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in other if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.adamw_learning_rate, betas=(0.9, 0.95), fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


class Batches:
    """Blocks of the corpus in an order that the seed decides, each once in a pass; any step's batch, at once."""

    def __init__(self, tokens: torch.Tensor, settings: Settings, device: torch.device):
        """`tokens`: int16 `[num_tokens]`, kept on `device`."""
        self._tokens, self._settings = tokens.to(device), settings
        self._num_blocks = (len(tokens) - 1) // settings.context
        self._offsets = torch.arange(settings.context + 1, device=device)
        self._passes: dict[int, np.ndarray] = {}

    def draw(self, step: int) -> torch.Tensor:
        """Returns the batch of `step`: int64 `[batch_sequences, context + 1]`, the targets one further."""
        first = step * self._settings.batch_sequences
        blocks = [self._find_block(index) for index in range(first, first + self._settings.batch_sequences)]
        starts = torch.tensor(blocks).to(self._tokens.device, non_blocking=True) * self._settings.context
        return self._tokens[starts[:, None] + self._offsets].long()

    def _find_block(self, index: int) -> int:
        number, position = divmod(index, self._num_blocks)
        if number not in self._passes:
            order = np.random.default_rng(self._settings.seed + number).permutation(self._num_blocks)
            self._passes = {number: order}
        return int(self._passes[number][position])


def compute_hidden(transformer: GPT2Model, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states `[batch, time, width]` of `inputs`, int64 `[batch, time]`, without padding.

    transformers builds a dense mask while a graph is captured, with which there is no flash attention.
    """
    x = transformer.wte(inputs) + transformer.wpe.weight[: inputs.shape[1]]
    for block in transformer.h:
        heads = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = heads.transpose(1, 3).unbind(2)  # each [batch, heads, time, width of a head]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    hidden: torch.Tensor = transformer.ln_f(x)
    return hidden


class GradientStep:
    """Forward and backward of one batch; on a GPU recorded once for each shape and replayed."""

    def __init__(self, model: GPT2LMHeadModel, bfloat16: bool):
        """`model` is on the device that computes; gradients are those of the last call."""
        self._model, self._device = model, model.device
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False)
        self._head_rows = 8192 if self._device.type == "cuda" else 512  # on a CPU the logits stay in the cache
        self._micro_tokens = 2**30 if self._device.type == "cuda" else 8192  # the memory of a CPU is small
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._compute_hidden = compute_hidden if self._device.type == "cuda" else torch.compile(compute_hidden)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`inputs`, `targets`: int64 `[batch, time]`. Returns the mean loss in nats per token, on the device."""
        if self._device.type != "cuda":
            return self._compute(inputs, targets)
        if inputs.shape not in self._recorded:
            self._recorded[inputs.shape] = self._record(inputs.clone(), targets.clone())
        graph, static_inputs, static_targets, loss = self._recorded[inputs.shape]
        static_inputs.copy_(inputs)
        static_targets.copy_(targets)
        graph.replay()
        return loss

    def _record(
        self, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, torch.Tensor]:
        with on_capture_stream():
            for _ in range(3):
                self._compute(inputs, targets)
        graph, loss = capture(lambda: self._compute(inputs, targets))
        return graph, inputs, targets, loss

    def _compute(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gradients stay in the same memory, as replays need."""
        for parameter in self._model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.zero_()
        rows, total = max(1, self._micro_tokens // inputs.shape[1]), torch.zeros((), device=self._device)
        for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            total += self._add_gradients(some, wanted, 1 / targets.numel())
        return total

    def _add_gradients(self, inputs: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """Adds the gradients of the summed loss times `scale`, which is returned; the head runs in chunks of rows."""
        head = self._model.lm_head.weight
        with self._autocast:
            hidden = self._compute_hidden(self._model.transformer, inputs).flatten(0, 1)
            total, gradients = torch.zeros((), device=self._device), []
            chunks = zip(hidden.split(self._head_rows), targets.flatten().split(self._head_rows), strict=True)
            for rows, wanted in chunks:
                leaf = rows.detach().requires_grad_()
                loss = F.cross_entropy(F.linear(leaf, head), wanted, reduction="sum") * scale
                loss.backward()
                total += loss.detach()
                gradients.append(leaf.grad)
        hidden.backward(torch.cat(gradients))
        return total


@torch.no_grad()
def measure_validation(
    model: GPT2LMHeadModel, text: str, tokenizer: ByteLevelBPETokenizer, settings: Settings
) -> dict[str, float]:
    """Perplexity and bits per byte of documents with EOS between them: each alone, in windows of the context length."""
    windows: list[torch.Tensor] = []
    num_bytes = 0
    for document in filter(None, (each.strip("\n") for each in text.split(EOS))):
        ids = torch.tensor([settings.eos, *tokenizer.encode(document).ids])
        windows += [ids[start : start + settings.context + 1] for start in range(0, len(ids) - 1, settings.context)]
        num_bytes += len(document.encode())
    windows.sort(key=len)
    nll = torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, len(windows), 16):
        padded = torch.nn.utils.rnn.pad_sequence(windows[start : start + 16], batch_first=True, padding_value=-100)
        padded = padded.to(model.device)
        logits = model(padded[:, :-1].clamp(min=0)).logits.float()
        nll += F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="sum")
    num_tokens = sum(len(window) - 1 for window in windows)
    mean = nll.item() / num_tokens
    return {
        "nll_nats_per_token": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": mean * num_tokens / math.log(2) / num_bytes,
        "tokens": num_tokens,
        "bytes": num_bytes,
    }


@dataclass
class Run:
    """One pre-training: what it was told, its model, and how far it is."""

    settings: Settings
    corpus: Path
    work: Path
    max_tokens: int | None  # None: one pass
    max_minutes: float | None = None
    validate_every: int = 250  # steps
    save_minutes: float = 5.0
    step: int = 0
    seconds: float = 0.0
    model: GPT2LMHeadModel = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    num_corpus_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Builds the model on the GPU where there is one, and reads the checkpoint where there is one."""
        self.work.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(self.settings).to(device).train()
        self.optimizers = build_optimizers(self.model, self.settings)
        path = self.work / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            if state["settings"] != asdict(self.settings):
                raise SystemExit(f"{path} was made with other settings: {state['settings']}; use another --work")
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resuming at step {self.step}", flush=True)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.settings.batch_sequences * self.settings.context

    @property
    def uses_bfloat16(self) -> bool:
        """True where products run in bfloat16: on a GPU, and on a CPU that has instructions for it."""
        return self.model.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()

    def find_progress(self) -> float:
        """The share of the run that is done, 0 to 1: of its steps or of its time, whichever is further."""
        steps = self.step * self.tokens_per_step / (self.max_tokens or self.num_corpus_tokens)
        return max(steps, self.seconds / 60 / self.max_minutes if self.max_minutes else 0.0)

    def train(self) -> None:
        """Trains until the tokens or the minutes are spent; the state is saved at the end and on the way."""
        tokens = build_tokens(self.corpus, self.work, self.settings)
        self.num_corpus_tokens = len(tokens)
        batches = Batches(tokens, self.settings, self.model.device)
        compute_gradients = GradientStep(self.model, self.uses_bfloat16)
        started, spent = time.monotonic(), self.seconds
        last_save = last_log = started
        while (progress := self.find_progress()) < 1:
            block = batches.draw(self.step)
            width = self.settings.context // (1 if progress >= 1 - self.settings.decay_share else 2)
            inputs, targets = block[:, :-1].reshape(-1, width), block[:, 1:].reshape(-1, width)
            loss = compute_gradients(inputs, targets)
            self.update_weights(progress)
            self.step += 1
            if self.step % 10 == 0:
                self.log({"loss": round(loss.item(), 4), "progress": round(progress, 4)})  # waits for the GPU
            self.seconds = spent + time.monotonic() - started
            if self.step % self.validate_every == 0:
                self.log({"validation": self.validate(max_characters=200_000)})
            now = time.monotonic()
            if now - last_log > 10:
                rate = self.step * self.tokens_per_step / self.seconds
                left = max(0.0, self.seconds / 60 * (1 / self.find_progress() - 1))
                print(f"step {self.step} loss {loss:.3f} {rate:,.0f} tokens/s {left:.1f} min left", flush=True)
                last_log = now
            if now - last_save > self.save_minutes * 60:
                self.save()
                last_save = time.monotonic()
        self.save()

    def update_weights(self, progress: float) -> None:
        """One step of the optimizers at the rate of `progress`: warm-up, constant, then linear to zero."""
        share = min(1.0, (self.step + 1) / self.settings.warmup_steps, (1 - progress) / self.settings.decay_share)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()

    def validate(self, max_characters: int | None = None) -> dict[str, float]:
        """Measures the start of `general_valid.txt`, or all of it, with the weights as they are."""
        text = (self.corpus / "general_valid.txt").read_text(encoding="utf-8")[:max_characters]
        tokenizer = build_tokenizer(self.corpus, self.work, self.settings)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.uses_bfloat16):
            return measure_validation(self.model.eval(), text, tokenizer, self.settings)

    def log(self, figures: dict[str, Any]) -> None:
        """Appends one line to `log.jsonl`, and lets training go on in training mode."""
        self.model.train()
        record = {"step": self.step, "tokens": self.step * self.tokens_per_step, "seconds": round(self.seconds, 1)}
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(record | figures) + "\n")

    def save(self) -> None:
        """Replaces the checkpoint as a whole; a kill leaves the old one or the new one."""
        path = self.work / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
        }
        torch.save(state, partial)
        os.replace(partial, path)


def export(run: Run, name: str, out: Path) -> None:
    """Writes the Hugging Face folder in float16 and measures what was written, not what was trained."""
    from transformers import GPT2TokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    settings, model, device = run.settings, run.model, run.model.device
    precision = "bfloat16 products, float32 weights" if run.uses_bfloat16 else "float32"
    model.config.activation_function = "gelu_new"  # the same formula under GPT-2's own name
    model.config.use_cache = True
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    tokenizer = GPT2TokenizerFast(
        vocab=str(run.work / "vocab.json"),
        merges=str(run.work / "merges.txt"),
        unk_token=EOS,
        bos_token=EOS,
        eos_token=EOS,
        model_max_length=settings.context,
        add_prefix_space=False,
    )
    tokenizer.save_pretrained(out)
    tokenizer.backend_tokenizer.model.save(str(out))
    written = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32).eval().to(device)
    text = (run.corpus / "general_valid.txt").read_text(encoding="utf-8")
    seen = run.step * run.tokens_per_step
    figures = {
        "steps": run.step,
        "tokens_seen": seen,
        "corpus_tokens": run.num_corpus_tokens,
        "epochs": seen / run.num_corpus_tokens,
        "seconds": run.seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "precision": precision,
        "parameters": sum(p.numel() for p in written.parameters()),
        "validation": measure_validation(written, text, build_tokenizer(run.corpus, run.work, settings), settings),
    }
    record = {"settings": asdict(settings), "figures": figures}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    facts = asdict(settings) | figures | figures["validation"]
    card = CARD.format(
        name=name, introduction=INTRODUCTIONS[name], samples=draw_samples(written.cpu(), run.work), **facts
    )
    (out / "CARD.md").write_text(card, encoding="utf-8")
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
    """Parses the command line, trains and exports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", choices=tuple(BASES), required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with general.txt.gz and general_valid.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder for vocabulary, tokens, log and checkpoint")
    parser.add_argument("--out", type=Path, help="folder to export to (none: no export)")
    parser.add_argument("--tokens", type=int, help="tokens to train on (default: one pass, or no limit with --minutes)")
    parser.add_argument("--minutes", type=float, help="minutes of training, over all runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--validate-every", type=int, default=250, help="steps between validations")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--prepare", action="store_true", help="make the vocabulary and the tokens, and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = BASES[args.base]
    if args.prepare:
        args.work.mkdir(parents=True, exist_ok=True)
        print(f"{len(build_tokens(args.corpus, args.work, settings)):,} tokens in {args.work}")
        return
    unlimited = 10**15 if args.minutes else None
    run = Run(
        settings,
        args.corpus,
        args.work,
        args.tokens or unlimited,
        args.minutes,
        args.validate_every,
        args.save_minutes,
    )
    run.train()
    if args.out:
        export(run, args.base, args.out)


if __name__ == "__main__":
    main()
