"""The choices of an answer: outputs of sequences as OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_gpt2.data.tokenizer import TextStream
from lora_gpt2.inference.sequence import SequenceState, TokenLogprobs
from lora_gpt2.serving.protocol import CompletionBody
from lora_gpt2.serving.worker import StepOutput


class CompletionChoice:
    """One choice of a response: collects a sequence's outputs, and turns what was not sent yet into JSON."""

    def __init__(self, sequence: SequenceState, body: CompletionBody) -> None:
        self.sequence, self.body = sequence, body
        self.num_tokens = 0
        self._text, self._finish_reason = "", ""
        self._logprobs: list[int | TokenLogprobs] = []
        self._is_first = True
        self._held: list[tuple[int, int | TokenLogprobs]] = []
        self._length, self._stream = 0, TextStream(sequence.tokenizer)

    def add(self, output: StepOutput) -> None:
        """Adds an output of the sequence."""
        if self.num_tokens == 0 and output.prompt_logprobs:
            self._logprobs += [self.sequence.prompt_ids[0], *output.prompt_logprobs]
        self._text += output.text
        self._logprobs += output.logprobs
        self.num_tokens, self._finish_reason = output.num_tokens, output.finish_reason

    def take_json(self) -> dict[str, Any]:
        """Returns what was added since the last call, as an element of `choices`; the first one may echo the prompt."""
        sequence, echoes, logprobs = self.sequence, self.body.echo and self._is_first, None
        text = (sequence.tokenizer.decode(sequence.prompt_ids) if echoes else "") + self._text
        if self.body.logprobs is not None:
            if echoes and not isinstance(next(iter(self._logprobs), None), int):
                self._logprobs.insert(0, sequence.prompt_ids[0])  # a prompt of one token has no log-probabilities
            logprobs = self._describe(self._take_logprobs(text), self.body.logprobs)
        self._is_first, self._text, self._logprobs = False, "", []
        reason = self._finish_reason or None
        return {"index": sequence.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _take_logprobs(self, text: str) -> list[tuple[int, int | TokenLogprobs]]:
        """Returns the tokens whose text begins in what was given out, now with `text`, each with its offset there.

        Those behind a stop string are never given out, like their text.
        """
        for item in self._logprobs:
            token = item if isinstance(item, int) else item.token
            self._held.append((self._stream.locate(token), item))
        self._length += len(text)
        is_whole = bool(self._finish_reason) and self._length >= self._stream.length
        count = sum(is_whole or offset < self._length for offset, _ in self._held)
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _describe(self, items: Sequence[tuple[int, int | TokenLogprobs]], count: int) -> dict[str, Any]:
        """Returns tokens as OpenAI does; the prompt's first is an id alone, because it has no log-probability."""
        tokenizer = self.sequence.tokenizer
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for offset, item in items:
            token, logprob, top = (item, None, ()) if isinstance(item, int) else (item.token, item.logprob, item.top)
            shown = tokenizer.show(token)
            found["tokens"].append(shown)
            found["token_logprobs"].append(logprob)
            alternatives = {tokenizer.show(other): value for other, value in top[:count]}
            if count and logprob is not None:
                alternatives.setdefault(shown, logprob)  # the chosen one is always among them
            found["top_logprobs"].append(alternatives or None)
            found["text_offset"].append(offset)
        return found | ({} if count else {"top_logprobs": None})


def count_usage(choices: Sequence[CompletionChoice], n: int) -> dict[str, int]:
    """Returns OpenAI's `usage`: the tokens of each prompt once, and those of all its `n` continuations."""
    prompt = sum(len(choice.sequence.prompt_ids) for choice in choices[::n])
    generated = sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
