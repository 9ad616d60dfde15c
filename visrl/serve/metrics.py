"""Counts of what the server does, written in Prometheus' text format. Knows nothing of requests beyond their counts."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
# Paths that are counted under their own name; a stranger's guesses must not make new series without end.
PATHS = {
    "/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}  # fmt: skip


class Histogram:
    """How often a value fell at or under each bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        reached = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            reached += count
            yield f'{name}_bucket{{le="{bound}"}} {reached}'
        yield f"{name}_sum {self.total:.6g}"
        yield f"{name}_count {reached}"


class Metrics:
    """All counts of one server. Written from the event loop and from the engine's thread, each its own fields."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.in_flight = 0
        self.seconds = Histogram(SECONDS)
        self.tokens: Counter[str] = Counter()
        self.cancelled = 0
        self.batch_sizes = Histogram(BATCH_SIZES)
        self.waiting_requests: Callable[[], int] = lambda: 0
        self.ready: Callable[[], bool] = lambda: False

    def begin(self) -> None:
        self.in_flight += 1

    def end(self, path: str, status: int, seconds: float) -> None:
        """A request ended; status 0 is one whose client left before any answer."""
        self.in_flight -= 1
        self.requests[path if path in PATHS else "other", status] += 1
        if path == "/v1/chat/completions":
            self.seconds.add(seconds)

    def text(self) -> str:
        """The page for `/metrics`."""
        lines = [
            *_head("visrl_requests_total", "counter", "Requests by path and status (0: the client left first)."),
            *(
                f'visrl_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ),
            *_single("visrl_requests_in_flight", "gauge", "Requests in work.", self.in_flight),
            *_head("visrl_request_seconds", "histogram", "Time of chat completions."),
            *self.seconds.lines("visrl_request_seconds"),
            *_head("visrl_tokens_total", "counter", "Tokens of finished choices."),
            *(f'visrl_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("prompt", "completion")),
            *_single(
                "visrl_rows_cancelled_total", "counter", "Rows whose client left or ran out of time.", self.cancelled
            ),
            *_single("visrl_rows_waiting", "gauge", "Rows that wait for the engine.", self.waiting_requests()),
            *_head("visrl_batch_rows", "histogram", "Rows computed together."),
            *self.batch_sizes.lines("visrl_batch_rows"),
            *_single("visrl_model_ready", "gauge", "1 once the model is loaded.", int(self.ready())),
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _single(name: str, kind: str, text: str, value: int) -> tuple[str, ...]:
    return (*_head(name, kind, text), f"{name} {value}")
