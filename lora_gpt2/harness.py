"""A model for lm-evaluation-harness: every adapter of a bank scored in one pass over the base.

    python -m lora_gpt2.harness --model_args base=gpt2,adapters=law+code --tasks lambada_openai,hellaswag

runs the harness once for each adapter, with its own options, tasks, tables and files; what the first run has to score
is scored for all of them in mixed batches, and the others find it done. Versions of the harness that load plugins know
the model as `--model lora-gpt2` as well, for one adapter or mix (`adapter=law:0.6+code:0.4`) at a time.

Contexts and continuations are tokenised by the harness, and cut and scored as by its `hf` model. Needs `lm_eval`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from lora_gpt2.core.errors import UsageError
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import open_session
from lora_gpt2.inference.session import Session
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.references import BASE

NAME = "lora-gpt2"
MAX_STOPS = 32  # of `generate.stop`
DEFAULT_NEW_TOKENS = 256  # as the harness's `hf` model


class TokenPair(NamedTuple):
    """What is only seen, and what is scored, as token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scorer:
    """Scores continuations under several mixes at once, and remembers what it has scored.

    Args:
        session: base and store.
        mixes: what each continuation is scored under.
        batch_tokens: tokens per forward pass.
    """

    def __init__(self, session: Session, mixes: Sequence[Mix], batch_tokens: int) -> None:
        self.session, self.mixes, self.batch_tokens = session, list(mixes), batch_tokens
        self._known: dict[tuple[TokenPair, Mix], tuple[float, bool]] = {}
        self.num_passes = 0

    def score(self, pairs: Sequence[TokenPair], mix: Mix) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation in nats, and whether greedy decoding would write it.

        Whatever of it was not asked before is scored under all mixes.
        """
        fresh = [pair for pair in dict.fromkeys(pairs) if (pair, mix) not in self._known]
        rows = [(pair, each) for pair in sorted(fresh, key=lambda p: -sum(map(len, p))) for each in self.mixes]
        for batch in self._iter_batches(rows):
            self._score_batch(batch)
        return [self._known[pair, mix] for pair in pairs]

    def _iter_batches(self, rows: Sequence[tuple[TokenPair, Mix]]) -> Iterator[list[tuple[TokenPair, Mix]]]:
        batch: list[tuple[TokenPair, Mix]] = []
        longest = 0
        for pair, mix in rows:
            longest = longest or sum(map(len, pair))
            if batch and (len(batch) + 1) * longest > self.batch_tokens:
                yield batch
                batch, longest = [], sum(map(len, pair))
            batch.append((pair, mix))
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[tuple[TokenPair, Mix]]) -> None:
        base, adapters = self.session.base, self.session.adapters_for([mix for _, mix in batch])
        device, context = base.runtime.device, base.config.n_positions
        cut = [(*pair.context, *pair.continuation)[-context - 1 :] for pair, _ in batch]
        longest, most = max(map(len, cut)) - 1, max(len(pair.continuation) for pair, _ in batch)
        tokens, targets = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), most).long()
        scored = torch.zeros(len(batch), most, dtype=torch.long)
        counts = torch.zeros(len(batch), most, dtype=torch.bool)
        for row, (ids, (pair, _)) in enumerate(zip(cut, batch, strict=True)):
            count = len(pair.continuation)
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, :count] = torch.tensor(pair.continuation)
            scored[row, :count] = torch.arange(len(ids) - 1 - count, len(ids) - 1)
            counts[row, :count] = True
        hidden = base.model(tokens.to(device), adapters)
        picked = hidden.gather(1, scored.to(device)[:, :, None].expand(-1, -1, hidden.shape[-1]))
        logits, targets, counts = base.model.logits(picked, adapters).float(), targets.to(device), counts.to(device)
        found = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
        sums = as_float64(found).masked_fill(~counts.to(as_float64(found).device), 0).sum(1).tolist()
        greedy = ((logits.argmax(2) == targets) | ~counts).all(1).tolist()
        self.num_passes += 1
        for key, total, is_greedy in zip(batch, sums, greedy, strict=True):
            self._known[key] = (total, bool(is_greedy))


@lru_cache(maxsize=1)
def _open_scorer(base: str, adapters: str, store: str, dtype: str, batch_tokens: int) -> Scorer:
    """Returns the scorer of some adapters; the runs of one process share it."""
    recipe = load_recipe(None, (), {"base": base or None})
    names = [name for name in adapters.split("+") if name]
    session, mixes = open_session(Store.find(store or None), names, recipe, dtype)
    return Scorer(session, mixes or [Mix()], batch_tokens)


class LoraGpt2(TemplateLM):  # type: ignore[misc]
    """The model `lora-gpt2` of the harness.

    Args:
        base: the base; by default that of the adapter.
        adapter: an adapter, a version or a mix; without one, the base.
        adapters: names joined by `+`, which are scored with it; see the module.
        store: folder of the store.
        dtype: of the base's weights.
        batch_tokens: tokens per forward pass.
    """

    def __init__(
        self,
        base: str = "",
        adapter: str = "",
        adapters: str = "",
        store: str = "",
        dtype: str = "float32",
        batch_tokens: int = 2048,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if adapters and not adapter:
            if "+" in adapters:
                raise UsageError("several adapters are several runs", "python -m lora_gpt2.harness --model_args …")
            adapter = adapters
        together = adapters or ("" if ":" in adapter or "+" in adapter else adapter)
        self.mix = Mix.parse(adapter or BASE)
        self.scorer = _open_scorer(base, together, store, dtype, int(batch_tokens))
        if self.mix not in self.scorer.mixes:
            self.scorer.mixes.append(self.mix)
        self.base = self.scorer.session.base

    @property
    def eot_token_id(self) -> int:
        """The token between documents, GPT-2's EOS."""
        return self.base.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.base.config.n_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Returns the token ids of a text."""
        return self.base.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        return self.scorer.score([TokenPair(tuple(context), tuple(rest)) for _, context, rest in requests], self.mix)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text in nats, in windows that do not overlap."""
        windows = [
            [
                TokenPair(tuple(context), tuple(rest))
                for context, rest in map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    ),
                )
            ]
            for request in requests
        ]
        scores = iter(self.scorer.score([pair for each in windows for pair in each], self.mix))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context up to its stop strings."""
        wanted = [_to_request(request.args[0], request.args[1], self.mix) for request in requests]
        outputs = generate(self.scorer.session, wanted, GenerateSettings(), truncate_left=True)
        return [output.text for output in outputs]


def _to_request(context: str, options: dict[str, Any], mix: Mix) -> Request:
    until = options.get("until") or []
    stops = tuple([until] if isinstance(until, str) else until)
    if len(stops) > MAX_STOPS:
        raise UsageError(f"a task has {len(stops)} stop strings", f"at most {MAX_STOPS} can be looked for")
    samples = options.get("do_sample") and options.get("temperature", 1.0) > 0
    settings = GenerateSettings(
        max_new_tokens=int(options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))),
        temperature=float(options.get("temperature", 1.0)) if samples else 0.0,
        top_k=int(options.get("top_k", 0)) if samples else 0,
        top_p=float(options.get("top_p", 1.0)) if samples else 1.0,
        stop=stops,
    )
    return Request(context, mix, random.getrandbits(31), settings)  # the harness seeds it


def register() -> None:
    """Makes the harness know the model by its name."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=LoraGpt2)


def split_runs(arguments: Sequence[str]) -> list[list[str]]:
    """Returns the command line of the harness for each adapter in `--model_args`, with its own `--output_path`."""
    given = list(arguments)
    if "--model_args" not in given or given.index("--model_args") + 1 == len(given):
        return [given]
    index = given.index("--model_args") + 1
    values = simple_parse_args_string(given[index])
    adapters = [name for name in str(values.get("adapters", "")).split("+") if name]
    runs = []
    for adapter in adapters or [str(values.get("adapter", ""))]:
        run = list(given)
        run[index] = ",".join(f"{key}={value}" for key, value in {**values, "adapter": adapter}.items() if value != "")
        if len(adapters) > 1 and "--output_path" in run:
            out = run.index("--output_path") + 1
            run[out] = f"{run[out].rstrip('/')}/{adapter}"
        runs.append(run)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the harness once for each adapter."""
    from lm_eval.__main__ import cli_evaluate

    register()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--model" not in given:
        given += ["--model", NAME]
    for run in split_runs(given):
        sys.argv = ["lm_eval", *run]
        cli_evaluate()


if __name__ == "__main__":
    main()
