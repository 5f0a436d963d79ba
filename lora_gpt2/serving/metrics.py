"""A server's metrics for Prometheus, named like vLLM's; each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ROUTES = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/choices": "choices",
    "/v1/models": "models",
    "/v1/adapters": "adapters",
    "/healthz": "health",
    "/readyz": "health",
    "/metrics": "metrics",
    "/training": "training",
}
"""The label `route` by the beginning of a path."""
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
            "lora_gpt2_step_batch_size",
            "Sequences with output in a step.",
            registry=registry,
            buckets=BATCH_SIZES,
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

    def record_request(self, seconds: float) -> None:
        """Records a finished completions request."""
        self._num_done += 1
        self._busy_seconds += seconds
        self.request_latency.observe(seconds)

    def record_status(self, path: str, status: int) -> None:
        """Records the answer to a request."""
        route = next((name for prefix, name in ROUTES.items() if path.startswith(prefix)), "other")
        self.requests.labels(route, status).inc()

    def record_step(self, batch_size: int, num_running: int, num_waiting: int) -> None:
        """Records a step of the engine."""
        self.num_running.set(num_running)
        self.num_waiting.set(num_waiting)
        self.batch_size.observe(batch_size)

    def render(self, num_loads: int) -> bytes:
        """Returns everything in Prometheus' text format; `num_loads` adapters were loaded so far."""
        self.adapter_loads.inc(num_loads - self._num_loads)
        self._num_loads = num_loads
        return generate_latest(self.registry)
