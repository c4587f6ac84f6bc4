"""What Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vora.serve.answer import Answer
from vora.serve.engine import AnyEngine

PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one app, in a registry of its own."""

    def __init__(self, engine: AnyEngine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vora_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.answers = Counter("vora_answers", "Answers by how they ended.", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("vora_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.answer_tokens = Counter("vora_answer_tokens", "Tokens of answers.", registry=registry)
        self.first_piece = Histogram(
            "vora_first_piece_seconds",
            "From a request to the first piece of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "vora_answer_seconds", "Until the end of an answer.", buckets=SECONDS, registry=registry
        )
        running = Gauge("vora_running", "Answers that are being generated.", registry=registry)
        running.set_function(lambda: engine.load()[0])
        waiting = Gauge("vora_waiting", "Requests that wait for the engine.", registry=registry)
        waiting.set_function(lambda: engine.load()[1])

    def answered(self, outcome: str, answer: Answer, seconds: float) -> None:
        """An answer has ended: stop, length, timeout, cancelled or error."""
        self.answers.labels(outcome).inc()
        self.seconds.observe(seconds)
        self.prompt_tokens.inc(answer.num_prompt_tokens)
        self.answer_tokens.inc(answer.num_tokens)

    def requested(self, path: str, status: int) -> None:
        """A request was answered; paths that are none of ours are counted together."""
        self.requests.labels(path if path in PATHS else "other", str(status)).inc()
