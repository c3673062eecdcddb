"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.responses = Counter(
            "rkf_http_responses", "Responses by path and status.", ("path", "status"), registry=self._registry
        )
        self.answers = Counter("rkf_answers", "Answers that ended, by why.", ("finish",), registry=self._registry)
        self.prompt_tokens = Counter("rkf_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.cached_tokens = Counter(
            "rkf_cached_prompt_tokens", "Tokens of prompts that were not computed again.", registry=self._registry
        )
        self.tokens = Counter("rkf_generated_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token_s = Histogram(
            "rkf_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.token_s = Histogram(
            "rkf_time_per_token_seconds",
            "Mean time between the tokens of an answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell a number as it is when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found
