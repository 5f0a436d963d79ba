"""`Model`: one base and its adapters, to generate with, to measure, and to hand to transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from lora_gpt2.api.arguments import Settings, check_keywords, make_recipe
from lora_gpt2.api.perplexity import Perplexity, read_text
from lora_gpt2.api.requests import add_in_memory, build_requests, choose_seed, iter_text, list_adapters, parse_mix
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.names import AUTO, check_name
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.data.tokenizer import check_texts
from lora_gpt2.evaluation.held_out import read_sketches
from lora_gpt2.evaluation.matrix import measure_matrix
from lora_gpt2.evaluation.token_scores import TokenScores, check_protocol, iter_token_scores
from lora_gpt2.inference.chat import build_chat_request, read_messages, strip_answer
from lora_gpt2.inference.choose import AdapterChoice
from lora_gpt2.inference.embedding import embed_texts
from lora_gpt2.inference.generate import Output, generate
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.merging.to_transformers import build_merged_model, build_peft_model
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.runtime import Runtime, choose_runtime
from lora_gpt2.recipe import GenerateSettings, Recipe
from lora_gpt2.store.exchange import parse_adapter
from lora_gpt2.store.fetch import FetchedAdapter, fetch_adapter
from lora_gpt2.store.references import label_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Model:
    """One frozen base and its adapters; `load` makes one.

    Every call names the adapter, version or mix that it wants (`law`, `law@2`, `law:0.6+code:0.4`; `auto` lets the text
    decide); without one it is the base. `law` is what is the current version in the store at that time. Nothing is
    switched, so calls do not depend on each other. Adapters of the store are loaded when they are first named. Use one
    from one thread.

    Attributes:
        adapters: names of the adapters that were loaded by `load` or added.
    """

    def __init__(self, session: Session, recipe: Recipe, reporter: Reporter) -> None:
        self.session, self.recipe, self.reporter = session, recipe, reporter
        self.adapters: list[str] = []
        self._in_memory: dict[str, Adapter] = {}
        self._measuring: Session | None = None

    def __repr__(self) -> str:
        base = self.session.base
        names = ", ".join(self.adapters) or "none"
        dtype = "float16" if self._is_packed else base.runtime.dtype_name
        return f"<Model {base.name} on {base.runtime.device.type} in {dtype}, adapters: {names}>"

    @property
    def base(self) -> str:
        """Name of the base."""
        return self.session.base.name

    @property
    def folder(self) -> Path:
        """Folder of the base, with the tokenizer that transformers' `AutoTokenizer` loads."""
        return self.session.base.folder

    def add_adapter(self, name: str, adapter: Adapter | FetchedAdapter | str | Path) -> None:
        """Adds an adapter in memory under a name, which goes before one of the store's with the same name.

        Args:
            name: what it is called from now on.
            adapter: an adapter, or a folder that PEFT saved, an archive or a hub id.

        Raises what `load` does, and `ConflictError` while a stream is being written with one of that name.
        """
        if isinstance(adapter, str | Path):
            adapter = fetch_adapter(str(adapter))
        if isinstance(adapter, FetchedAdapter):
            adapter = parse_adapter(adapter, self.session.base, self.reporter)
        if not isinstance(adapter, Adapter):
            raise UsageError(f"an adapter is expected, found {type(adapter).__name__}", "pass a folder that PEFT saved")
        check_name(name)
        if name in self._in_memory and self.session.slots.count_pins(name) > 1:
            raise ConflictError(f"a stream writes with '{name}'", "finish or close it first, or take another name")
        for session in (self.session, self._measuring):
            if session is not None:
                add_in_memory(session, {name: adapter}, is_new=name not in self._in_memory)
        self._in_memory[name] = adapter
        self.adapters = list(dict.fromkeys([*self.adapters, name]))

    def generate(
        self,
        prompt: str,
        adapter: Any = None,
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int | None = None,
        stop: str | Sequence[str] | None = None,
        choice: Sequence[str] | None = None,
        regex: str | None = None,
        json_schema: Any = None,
        truncate_left: bool = False,
        settings: Settings = None,
    ) -> Output:
        """Continues a prompt.

        Args:
            prompt: the text to continue.
            adapter: an adapter, a version, a mix, `auto`, or None for the base.
            seed: makes the result repeatable; by default it is drawn, and is in the output.
            max_new_tokens: default 150.
            temperature: default 0.7; 0 is greedy.
            top_k: sample from the k most likely tokens; default 50, 0 is off.
            top_p: nucleus sampling; default 0.95, 1 is off.
            min_p: minimum probability relative to the most likely token; 0, the default, is off.
            repetition_penalty: 1, the default, is off.
            num_beams: beam search, instead of sampling.
            stop: one or more strings before the first of which the text ends.
            choice: the text is exactly one of these, such as `[" yes", " no"]`.
            regex: the text matches this regular expression as a whole.
            json_schema: the text is JSON that this schema accepts: a mapping, a file, or a class of pydantic.
            truncate_left: drop the beginning of a prompt that is too long, instead of raising.
            settings: any other setting, such as `{"generate.no_repeat_ngram_size": 3}`.

        Returns:
            An output, whose `str()` is the continuation.

        Raises:
            UsageError: a prompt is too long, or a mix is none.
            NotFoundError: there is no such adapter.
            CorruptError: the logits under an adapter are not finite.
        """
        keywords: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "num_beams": num_beams,
            "stop": stop,
            "choice": choice,
            "regex": regex,
            "json_schema": json_schema,
        }
        return self.generate_batch(
            [prompt], adapter, seed=seed, truncate_left=truncate_left, settings=settings, **keywords
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        adapter: Any = None,
        *,
        n: int = 1,
        seed: int | None = None,
        truncate_left: bool = False,
        settings: Settings = None,
        **everyday: Any,
    ) -> list[Output]:
        """Continues prompts together, each with its own adapter if wanted.

        Args:
            prompts: the texts to continue.
            adapter: one for all, as `generate` takes it, or a list with one for each prompt.
            n: continuations of each prompt; with `num_beams`, the best ones that the search finds.
            seed: of the first continuation; the next one, of this prompt or the next, has `seed + 1`, and so on.
            truncate_left: see `generate`, as for everything else.
            settings: any other setting.
            everyday: the settings with a keyword, such as `temperature`.

        Returns:
            The outputs: for each prompt, for each of `n`.

        Raises what `generate` does.
        """
        check_keywords("generate_batch", "generate", everyday)
        requests = build_requests(prompts, adapter, n, seed, self._router)
        chosen = self._choose_settings(everyday, settings)
        return generate(self.session, requests, chosen, truncate_left=truncate_left)

    def stream(self, prompt: str, adapter: Any = None, **arguments: Any) -> Iterator[str]:
        """Yields the continuation of a prompt as it grows; the arguments are those of `generate`, without `n`."""
        seed, settings = arguments.pop("seed", None), arguments.pop("settings", None)
        truncate_left = arguments.pop("truncate_left", False)
        check_keywords("stream", "generate", arguments)
        chosen = self._choose_settings(arguments, settings)
        requests = build_requests([prompt], adapter, 1, seed, self._router)
        return iter_text(self.session, requests, chosen, truncate_left)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        adapter: Any = None,
        *,
        seed: int | None = None,
        settings: Settings = None,
        **everyday: Any,
    ) -> Output:
        """Answers a chat, with turns written as the adapter's training text has them.

        Args:
            messages: the chat, as OpenAI's API has it: `{"role": "user", "content": "A table for two?"}`, …; the oldest
                make room where it is too long.
            adapter: an adapter or a mix that was trained on chats, or `auto`.
            seed: makes the result repeatable.
            settings: any other setting; `generate.chat_turns` says how turns are written where no training text does.
            everyday: the settings with a keyword, such as `temperature`.

        Returns:
            An output, whose `str()` is the answer.

        Raises:
            UsageError: a message is none, the last one is too long, or nothing says how turns are written.
        """
        check_keywords("chat", "generate", everyday)
        chosen, router = self._choose_settings(everyday, settings), self._router
        mix = AUTO_MIX if adapter == AUTO else parse_mix(adapter)
        first = choose_seed(seed)
        request, _ = build_chat_request(self.session, read_messages(messages), mix, first, chosen, router)
        return strip_answer(generate(self.session, [request], chosen)[0])

    def perplexity(
        self,
        texts: Texts | str | Path,
        adapter: Any = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        protocol: str | None = None,
        profile: str | None = None,
        settings: Settings = None,
    ) -> Perplexity:
        """Measures texts under an adapter, a mix or the base, read and cleaned as training does it.

        Args:
            texts: a text, texts, records, or a data set; a `Path` is a file or folder of text.
            adapter: an adapter, a version or a mix; None is the base.
            window: tokens of context; default the base's maximum.
            stride: tokens between windows; default half the window.
            protocol: `document` (the default) or `stream`.
            profile: how texts are cleaned first; `raw` measures them as they are.
            settings: any other setting.

        Returns:
            The figure, with its interval. It is measured in float32 unless `load` was given another dtype.

        Raises:
            DataError: there is nothing to score.
        """
        keywords = {"window": window, "stride": stride, "protocol": protocol, "profile": profile}
        recipe = make_recipe(settings, "evaluate", keywords, loaded=self._loaded)
        text, mix, session = read_text(texts, recipe, self.reporter), parse_mix(adapter), self._open_measuring(recipe)
        resolved = session.resolve(mix)
        versions = list(map(label_of, resolved.references))
        known = {str(mix): versions} if set(mix.references).isdisjoint(self._in_memory) else {}
        (cell,) = measure_matrix(
            session.base,
            {str(mix): session.select(resolved)},
            [text],
            recipe.evaluate,
            self.reporter,
            sketches=read_sketches(session.store, known),
        )
        return Perplexity.from_cell(cell, session.base.runtime.dtype_name, versions)

    def token_logprobs(
        self,
        texts: Texts | str | Path,
        adapter: Any = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        profile: str | None = None,
        settings: Settings = None,
    ) -> list[TokenScores]:
        """Returns the log-probability of each token of texts, which are read and cleaned as `perplexity` does it.

        Args:
            texts: see `perplexity`.
            adapter: an adapter, a version, a mix or None for the base; or a list of them, for each of which there are
                log-probabilities.
            window: tokens of context; default the base's maximum.
            stride: tokens between windows; default half the window.
            profile: how texts are cleaned first; `raw` scores them as they are.
            settings: any other setting.

        Returns:
            The scores of each document; their mean over all tokens is `nll_nats_per_token` of `perplexity`, negated.

        Raises:
            DataError: there is nothing to score.
        """
        keywords = {"window": window, "stride": stride, "profile": profile}
        recipe = make_recipe(settings, "evaluate", keywords, loaded=self._loaded)
        check_protocol(recipe.evaluate)
        text, session = read_text(texts, recipe, self.reporter), self._open_measuring(recipe)
        rows = {str(mix): session.select(session.resolve(mix)) for mix in map(parse_mix, list_adapters(adapter))}
        cells = measure_matrix(session.base, rows, [text], recipe.evaluate, self.reporter, keep_tokens=True)
        return list(iter_token_scores(session.base.tokenizer, [text], cells))

    def embed(self, texts: Sequence[str], adapter: Any = None) -> Float[np.ndarray, "texts width"]:
        """Returns each text as a vector: the mean of the last hidden states of its tokens, as `serve` gives it.

        Args:
            texts: at least one token each, and at most as many as the base's context.
            adapter: an adapter, a version, a mix, or None for the base.

        Returns:
            float32 `[texts, width]`, of a width of 768 for GPT-2 124M.

        Raises:
            UsageError: a text is empty or too long.
        """
        if isinstance(texts, str):
            raise UsageError("texts are a list of str", "embed([text])")
        session = self._open_measuring(self.recipe)
        ids, context = session.base.tokenizer.encode_batch(texts), session.base.config.n_positions
        if bad := [len(each) for each in ids if not 0 < len(each) <= context]:
            raise UsageError(f"a text has {bad[0]:,} tokens, 1 to {context:,} are expected", "embed parts of it")
        vectors: np.ndarray = embed_texts(session, session.resolve(parse_mix(adapter)), ids).numpy()
        return vectors

    def choose(self, text: str) -> AdapterChoice:
        """Returns the adapter under which a text is most likely, as `auto` takes it, and how sure that is."""
        check_texts([text], "a text")
        return self._router.choose(text)

    @property
    def _router(self) -> Router:
        return Router(self.session, self.adapters or None)

    def to_transformers(self, adapter: Any = None, *, merged: bool = True) -> PreTrainedModel:
        """Returns a model of transformers, in float32, for its pipelines and trainers.

        Args:
            adapter: an adapter, a version or a mix; None is the base.
            merged: a plain `GPT2LMHeadModel` with the update in its weights; else a `PeftModel`, for one adapter or
                mix.

        Its tokenizer is in `folder`: `AutoTokenizer.from_pretrained(model.folder)`.
        """
        mix, session = parse_mix(adapter), self._open(choose_runtime("float32"))
        adapters = [session.fetch(reference).adapter for reference in mix.references]
        weights = [weight for _, weight in mix]
        if merged or not mix:
            return build_merged_model(session.base, adapters, weights)
        return build_peft_model(session.base, adapters, weights)

    def _choose_settings(self, keywords: Mapping[str, Any], settings: Settings) -> GenerateSettings:
        stop = keywords.get("stop")
        keywords = {**keywords, "stop": (stop,) if isinstance(stop, str) else stop}
        chosen = make_recipe(settings, "generate", keywords, loaded=self._loaded).generate
        self.session.prefixes.max_bytes = chosen.prefix_cache_bytes
        return chosen

    @property
    def _loaded(self) -> dict[str, Any]:
        return {"base": self.base, "generate.dtype": self.recipe.generate.dtype}

    def _open_measuring(self, recipe: Recipe) -> Session:
        """Returns a session to measure with: in `evaluate.dtype` if it is set, else in what `load` was given."""
        loaded = self.recipe.generate.dtype
        given = "auto" if self._is_packed or "dtype" in recipe.evaluate.model_fields_set else loaded
        return self._open(choose_runtime(recipe.evaluate.dtype if given == "auto" else given))

    def _open(self, runtime: Runtime) -> Session:
        """Returns a session in this runtime: the one that generates, if it is that."""
        base = self.session.base
        if runtime == base.runtime and not self._is_packed:
            return self.session
        if self._measuring is None or self._measuring.base.runtime != runtime:
            measuring = Session(load_base(base.name, runtime), self.session.store)
            add_in_memory(measuring, self._in_memory)
            self._measuring = measuring
        return self._measuring

    @property
    def _is_packed(self) -> bool:
        """True if the weights are packed, and only generate: float16 on a CPU."""
        return self.session.base.model.prepacked_head is not None
