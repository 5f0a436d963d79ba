"""What a server counts, for Prometheus; each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROWS = (1, 2, 4, 8, 16, 32)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one server; the names begin with `lora_gpt2_`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("lora_gpt2_requests", "Answers.", ["route", "status"], registry=registry)
        self.prompt_tokens = Counter("lora_gpt2_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("lora_gpt2_tokens", "Tokens written.", registry=registry)
        self.swaps = Counter("lora_gpt2_adapter_loads", "Adapters brought into a slot.", registry=registry)
        self.growing = Gauge("lora_gpt2_rows_growing", "Continuations that grow.", registry=registry)
        self.waiting = Gauge("lora_gpt2_rows_waiting", "Continuations that wait for a row.", registry=registry)
        self.batch = Histogram("lora_gpt2_batch_rows", "Rows of a step.", registry=registry, buckets=ROWS)
        self.first_token = Histogram(
            "lora_gpt2_first_token_seconds",
            "From a request's body to its first token.",
            registry=registry,
            buckets=SECONDS,
        )
        self.latency = Histogram(
            "lora_gpt2_request_seconds", "From a request's body to its end.", registry=registry, buckets=SECONDS
        )
        self._loads = 0
        self._num_done, self._busy_seconds = 0, 0.0

    @property
    def mean_seconds(self) -> float:
        """Mean time of a completions request; 0 before the first."""
        return self._busy_seconds / max(1, self._num_done)

    def note_done(self, seconds: float, usage: dict[str, int]) -> None:
        """Takes in a completions request that has ended."""
        self._num_done += 1
        self._busy_seconds += seconds
        self.latency.observe(seconds)
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.tokens.inc(usage["completion_tokens"])

    def note_step(self, grown: int, growing: int, waiting: int, num_loads: int) -> None:
        """Takes in one step of the engine: rows that it grew, that go on and that wait, adapters loaded so far."""
        self.growing.set(growing)
        self.waiting.set(waiting)
        self.batch.observe(grown)
        self.swaps.inc(num_loads - self._loads)
        self._loads = num_loads

    def render(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)
