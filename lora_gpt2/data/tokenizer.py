"""Byte-level BPE as GPT-2 has it, through the `tokenizers` library alone: no torch, no templates, ready in 50 ms.

Tokens that were added to a base's vocabulary are tokens wherever a text has them, special ones included, as in
transformers. EOS alone, which stands between documents, is ordinary characters inside text: it is added only by us, as
a number. It is `<|endoftext|>` where there is one. A base whose settings call another token so, such as `<|im_end|>`
at the end of a turn, has that in its texts, and stops at either.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from lora_gpt2.core.errors import CorruptError, DataError, NotFoundError, UsageError
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.memory import check_room
from lora_gpt2.core.strict_json import load_json

EOS = "<|endoftext|>"
ROOM_BYTES = 2**25  # the backend ends the process where it runs out of memory


def check_texts(texts: Iterable[object], what: str) -> None:
    """Raises `UsageError` unless all are texts; `what` says what one of them is."""
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{what} is a str, found {type(text).__name__}", "pass texts")


class Tokenizer:
    """Text to token ids and back, for one base."""

    def __init__(
        self, backend: BackendTokenizer, eos_id: int, stop_id: int | None = None, more_ends: Iterable[int] = ()
    ) -> None:
        added = backend.get_added_tokens_decoder()
        self._ends = {EOS, added[eos_id].content} if eos_id in added else {EOS}
        self._has_special = any(token.special and token.content not in self._ends for token in added.values())
        backend.encode_special_tokens = not self._has_special
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.eos_id = backend, eos_id
        self.stop_id = eos_id if stop_id is None else stop_id
        self.stop_ids = frozenset({self.eos_id, self.stop_id, *more_ends})

    def __reduce__(self) -> tuple[Any, ...]:
        """Goes to another process as its vocabulary alone: how special tokens are read does not survive a copy."""
        return _rebuild, (self.backend.to_str(), self.eos_id, self.stop_id, self.stop_ids)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, EOS included; ids below it that no token has are possible."""
        return max(self.eos_id, *self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Names the vocabulary, the merges and EOS; adapters are bound to it."""
        return self._name(self.eos_id)

    @cached_property
    def fingerprints(self) -> frozenset[str]:
        """The fingerprint, and that of earlier versions, for which EOS was what the tokenizer's settings call so."""
        return frozenset({self.fingerprint, self._name(self.stop_id)})

    def _name(self, eos_id: int) -> str:
        model = json.loads(self.backend.to_str())["model"]
        named = {"vocab": model["vocab"], "merges": model["merges"], "eos": eos_id}
        tokens = self.backend.get_added_tokens_decoder()
        added = {each.content: index for index, each in tokens.items() if index != eos_id}
        added = {text: index for text, index in added.items() if text not in model["vocab"]}
        return fingerprint_json(named | ({"added": added} if added else {}))

    @cached_property
    def added(self) -> dict[int, str]:
        """The text of each added token but EOS, by id."""
        tokens = self.backend.get_added_tokens_decoder()
        return {index: token.content for index, token in tokens.items() if index != self.eos_id}

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text; raises `DataError` for lone surrogates, which no UTF-8 text has.

        Raises `UsageError` for what is no text; a pair of texts would be one to the library.
        """
        check_texts(texts, "a text")
        if self._has_special and any(end in text for text in texts for end in self._ends):
            return [self._encode_around_eos(text) for text in texts]
        check_room(ROOM_BYTES)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:  # which of them depends on the version of the library
            raise DataError("the text holds a lone surrogate, which is not Unicode text", "remove it") from error
        return [encoding.ids for encoding in encodings]

    def _encode_around_eos(self, text: str) -> list[int]:
        """Returns the token ids of a text in which EOS, which only we set, stays a text among special tokens."""
        parts = re.split("|".join(f"({re.escape(end)})" for end in sorted(self._ends)), text)
        encoded = ((self._plain_ends[part] if part in self._ends else self.encode(part)) for part in parts if part)
        return [token for ids in encoded for token in ids]

    @cached_property
    def _plain_ends(self) -> dict[str, list[int]]:
        """The token ids of EOS as ordinary characters."""
        backend = BackendTokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return {end: backend.encode(end, add_special_tokens=False).ids for end in self._ends}

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        stream = TextStream(self)
        return "".join(stream.push(token) for token in ids) + stream.finish()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token id, added ones included; EOS and unknown ids have none."""
        alphabet = byte_alphabet()
        table = [b""] * self.vocab_size
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            if index != self.eos_id:
                table[index] = bytes(alphabet[c] for c in token if c in alphabet)
        for index, text in self.added.items():
            table[index] = text.encode()
        return table

    def show(self, token: int) -> str:
        """Returns a token's text; one that is part of a character as `bytes:\\xe2\\x82`, as OpenAI does."""
        if token == self.eos_id:
            return EOS
        content = self.token_bytes[token]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def list_vocabulary(self) -> tuple[list[str], list[str]]:
        """Returns the tokens by id, in GPT-2's printable letters, and the merges as `left right`."""
        model = json.loads(self.backend.to_str())["model"]
        tokens = [""] * self.vocab_size
        for token, index in {EOS: self.eos_id, **self.backend.get_vocab(with_added_tokens=True)}.items():
            tokens[index] = token
        return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _rebuild(backend: str, eos_id: int, stop_id: int, stop_ids: frozenset[int]) -> Tokenizer:
    return Tokenizer(BackendTokenizer.from_str(backend), eos_id, stop_id, stop_ids)


class TextStream:
    """Turns tokens into text as they come, and never shows half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.length = 0

    def push(self, token: int) -> str:
        """Returns the text that this token completes; it may be empty."""
        new = self._decoder.decode(self._tokenizer.token_bytes[token])
        self.length += len(new)
        return new

    def locate(self, token: int) -> int:
        """Pushes a token; returns the index in the text of the character with which it begins, or whose part it is."""
        begin, new, own = self.length, self.push(token), self._tokenizer.show(token)
        return begin + len(new) - len(own) if new.endswith(own) else begin  # what is left of a character before it

    def finish(self) -> str:
        """Returns what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def load_tokenizer(
    folder: Path, eos_id: int, vocab_size: int | None = None, ends: Sequence[Sequence[int]] = ()
) -> Tokenizer:
    """Loads `tokenizer.json`, or `vocab.json` and `merges.txt`, from a base's folder.

    EOS is `<|endoftext|>`, else what `tokenizer_config.json` calls so, else `eos_id`, which the model's configuration
    gives: that is often left at its default, which in another vocabulary is any word. Of `ends`, lists of tokens that
    end a text, those count that have EOS among them. Added tokens beyond a model's `vocab_size`, such as a `[PAD]` that
    it was never resized for, are left out: they are characters.

    Raises:
        NotFoundError: the folder holds neither.
        CorruptError: the files are not a byte-level BPE, or nothing names EOS.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    hint = "a GPT-2 folder has tokenizer.json, or vocab.json and merges.txt"
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        raise NotFoundError(f"{folder} has no tokenizer", hint)
    try:
        if whole.is_file():
            backend = BackendTokenizer.from_file(str(whole))
        else:
            backend = BackendTokenizer(models.BPE.from_file(str(vocab), str(merges)))
            has_space = _read_settings(folder, "add_prefix_space") is True
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_space)
            backend.decoder = decoders.ByteLevel()
            _add_tokens(backend, folder)
        backend = _leave_out(backend, vocab_size)
    except Exception as error:  # `tokenizers` raises bare Exception for everything
        raise CorruptError(f"the tokenizer in {folder} cannot be read: {error}", hint) from error
    if not isinstance(backend.model, models.BPE) or backend.get_vocab_size(with_added_tokens=False) < 256:
        raise CorruptError(f"the tokenizer in {folder} is not GPT-2's byte-level BPE", hint)
    backend.post_processor = None
    own = backend.token_to_id(_read_eos(folder))
    found = next((index for index in (backend.token_to_id(EOS), own) if index is not None), eos_id)
    if found < 0:
        hint = "name eos_token in tokenizer_config.json"
        raise CorruptError(f"nothing in {folder} says which token ends a text", hint)
    size = backend.get_vocab_size()
    more = {each for listed in ends if {found, own} & set(listed) for each in listed if 0 <= each < size}
    return Tokenizer(backend, found, own, more)


def _leave_out(backend: BackendTokenizer, vocab_size: int | None) -> BackendTokenizer:
    """Returns the backend without added tokens beyond a vocabulary."""
    if vocab_size is None or all(index < vocab_size for index in backend.get_added_tokens_decoder()):
        return backend
    values = json.loads(backend.to_str())
    known = [token for token in values["added_tokens"] if token["id"] < vocab_size]
    return BackendTokenizer.from_str(json.dumps({**values, "added_tokens": known}))


def _add_tokens(backend: BackendTokenizer, folder: Path) -> None:
    """Adds the tokens of `added_tokens.json`, as slow tokenizers saved them; raises `ValueError` if an id is taken."""
    if not (folder / "added_tokens.json").is_file():
        return
    added: dict[str, int] = load_json((folder / "added_tokens.json").read_bytes())
    for text in sorted(added, key=added.__getitem__):
        backend.add_tokens([AddedToken(text, normalized=False)])
        if backend.token_to_id(text) != added[text]:
            raise ValueError(f"added_tokens.json gives {text!r} the id {added[text]}, which does not follow")


def _read_eos(folder: Path) -> str:
    """Returns what a tokenizer's own settings call EOS, or ""."""
    token = _read_settings(folder, "eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read_settings(folder: Path, key: str) -> Any:
    """Returns what a tokenizer's own settings say, None if nothing does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            values = load_json((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.get(key) is not None:
            return values[key]
    return None
