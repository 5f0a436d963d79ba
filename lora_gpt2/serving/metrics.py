"""A server's metrics for Prometheus, named like vLLM's; each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one server; the names begin with `lora_gpt2_`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("lora_gpt2_requests", "HTTP requests.", ["route", "status"], registry=registry)
        self.prompt_tokens = Counter("lora_gpt2_prompt_tokens", "Prefilled tokens.", registry=registry)
        self.generation_tokens = Counter("lora_gpt2_generation_tokens", "Generated tokens.", registry=registry)
        self.adapter_loads = Counter("lora_gpt2_adapter_loads", "Adapters loaded into a slot.", registry=registry)
        self.num_running = Gauge("lora_gpt2_num_seqs_running", "Sequences running.", registry=registry)
        self.num_waiting = Gauge("lora_gpt2_num_seqs_waiting", "Sequences in the queue.", registry=registry)
        self.batch_size = Histogram(
            "lora_gpt2_step_batch_size", "Sequences per step.", registry=registry, buckets=BATCH_SIZES
        )
        self.time_to_first_token = Histogram(
            "lora_gpt2_time_to_first_token_seconds", "Time to first token.", registry=registry, buckets=SECONDS
        )
        self.request_latency = Histogram(
            "lora_gpt2_e2e_request_latency_seconds", "Latency of a request.", registry=registry, buckets=SECONDS
        )
        self._num_loads = 0
        self._num_done, self._busy_seconds = 0, 0.0

    @property
    def mean_seconds(self) -> float:
        """Mean latency of a completions request; 0 before the first."""
        return self._busy_seconds / max(1, self._num_done)

    def record_request(self, seconds: float, usage: dict[str, int]) -> None:
        """Records a finished completions request."""
        self._num_done += 1
        self._busy_seconds += seconds
        self.request_latency.observe(seconds)
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.generation_tokens.inc(usage["completion_tokens"])

    def record_step(self, batch_size: int, num_running: int, num_waiting: int, num_loads: int) -> None:
        """Records a step of the engine; `num_loads` is the total number of adapters loaded so far."""
        self.num_running.set(num_running)
        self.num_waiting.set(num_waiting)
        self.batch_size.observe(batch_size)
        self.adapter_loads.inc(num_loads - self._num_loads)
        self._num_loads = num_loads

    def render(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)
