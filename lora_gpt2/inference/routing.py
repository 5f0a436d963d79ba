"""`auto`: the adapter of a store that a text belongs to, chosen before it is continued, and again as it grows.

The likelihood of the text under every adapter decides, see `choose`. Where there are many adapters, a first pass takes
those whose training text lies nearest, see `embedding`; only these are loaded and scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.names import AUTO
from lora_gpt2.inference.choose import AdapterChoice, choose_adapter
from lora_gpt2.inference.embedding import EmbeddingMoments, embed_batch, rank_by_distance
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.manifest import Manifest

AUTO_MIX = Mix.single(AUTO)
FEW, NEAREST = 16, 8
"""Up to how many adapters are all scored, and how many of more are."""
SHORTLIST_TOKENS = 64
REFRESH_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class RoutedMix:
    """A choice that was made when a continuation had `num_tokens` tokens: the resolved mix, and where it is from."""

    router: Router
    choice: AdapterChoice
    mix: Mix
    adapters: Sequence[dict[str, Any]]
    num_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of a text's provenance."""
        own = {key: adapter[key] for adapter in self.adapters for key in ("adapter", "sha256")}
        return {"token": self.num_tokens, "adapter": self.choice.adapter, **own, "probability": self.choice.probability}


@dataclass(frozen=True)
class _Known:
    """What is remembered of a candidate: which version it is, and what that says."""

    version: tuple[int, str] | None
    manifest: Manifest | None
    moments: EmbeddingMoments | None


class Router:
    """Chooses adapters for texts.

    Args:
        session: scores the texts; whoever uses it uses the router.
        names: the candidates; None for all adapters in the session's store that are of its base, as they are then.
        on_choice: is told of each choice.
        abstains: take the base where no candidate is clearly the one.
    """

    def __init__(
        self,
        session: Session,
        names: Sequence[str] | None = None,
        on_choice: Callable[[AdapterChoice], None] = lambda choice: None,
        *,
        abstains: bool = True,
    ) -> None:
        self.session, self._names, self._on_choice, self._abstains = session, names, on_choice, abstains
        self._versions: dict[str, tuple[int, str]] = {}
        self._known: dict[str, _Known] = {}
        self._listed_at = -math.inf

    def choose(self, text: str) -> AdapterChoice:
        """Returns the adapter under which a text is most likely, `base` where none is clearly so.

        Adapters that cannot be used are no candidates.
        """
        names = self._shortlist(text, self.list_names())
        usable = [name for name in names if self._is_usable(name)]
        choice = choose_adapter(self.session, text, usable, abstains=self._abstains)
        self._on_choice(choice)
        return choice

    def among(self, names: Sequence[str]) -> Router:
        """Returns a router of some of the candidates that never abstains, and knows what this one has read."""
        router = Router(self.session, names, self._on_choice, abstains=False)
        router._versions, router._known = self._versions, self._known
        return router

    def route(self, text: str, num_tokens: int = 0) -> RoutedMix:
        """Returns what is chosen for a text whose last `num_tokens` tokens were generated."""
        choice = self.choose(text)
        mix = self.session.resolve(Mix.parse(choice.adapter))
        described = self.session.describe_adapters(mix, {})
        return RoutedMix(router=self, choice=choice, mix=mix, adapters=described, num_tokens=num_tokens)

    def list_names(self) -> list[str]:
        """Returns the candidates; a large store is looked through once a second at most."""
        if self._names is not None:
            return list(self._names)
        age = time.monotonic() - self._listed_at
        if len(self._versions) <= FEW or age > REFRESH_SECONDS:
            rows = list_current(self.session.store)[0] if self.session.store is not None else []
            own = [row for row in rows if row["base_fingerprint"] == self.session.base.fingerprint]
            self._versions = {row["name"]: (row["version"], row["created"]) for row in own}
            self._listed_at = time.monotonic()
        return list(self._versions)

    def _shortlist(self, text: str, names: Sequence[str]) -> list[str]:
        """Returns the adapters worth scoring: where there are many, the nearest, and those of which that is unknown."""
        base = self.session.base
        ids = base.tokenizer.encode(text)[-SHORTLIST_TOKENS:]
        if len(names) <= FEW or not ids:
            return list(names)
        moments = {name: self._find_moments(name) for name in names}
        known = [(name, own) for name, own in moments.items() if own is not None]
        if not known:
            return list(names)
        vector = embed_batch(self.session, Mix(), [ids])[0]
        nearest = rank_by_distance(vector, [own for _, own in known])[:NEAREST]
        return [*(known[index][0] for index in nearest), *(name for name in names if moments[name] is None)]

    def _find_moments(self, name: str) -> EmbeddingMoments | None:
        """Returns what is known of an adapter's training text."""
        return self._read(name).moments

    def find_manifest(self, name: str) -> Manifest | None:
        """Returns the manifest of a candidate; None if it cannot be read."""
        return self._read(name).manifest

    def _read(self, name: str) -> _Known:
        """Returns what a candidate says of itself, read once for each version."""
        version, store = self._versions.get(name), self.session.store
        known = self._known.get(name)
        if known is None or known.version != version:
            try:
                manifest = store.read_manifest(name) if store is not None else None
            except LoraGpt2Error:
                manifest = None
            described = manifest.data.get("embedding") if manifest is not None else None
            moments = EmbeddingMoments.parse(described, self.session.base.config.n_embd)
            known = self._known[name] = _Known(version, manifest, moments)
        return known

    def _is_usable(self, name: str) -> bool:
        try:
            self.session.load(self.session.resolve(Mix.parse(name)).references)
        except LoraGpt2Error:
            return False
        return True
