"""The figures of `/metrics` in the form that Prometheus reads.

Format: https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md. Figures named
`epd_worker_…` and `epd_stage_…` are what workers last said of themselves; each proxy tells it of each worker, so take
the `max by (address)` over proxies before summing. All others are the proxy's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from epd import __version__
from epd.messages import StageStats
from epd.observability import BOUNDS_MS
from metastore.roster import Member
from proxy.cluster.worker_connection import WorkerConnection
from proxy.figures.metrics import Metrics, ModelFigures

_LABELS = ("role", "address", "model")
_GAUGES: tuple[tuple[str, str, Callable[[WorkerConnection], float]], ...] = (
    ("up", "1 while the worker answers", lambda one: one.info is not None),
    ("ready", "1 while the worker takes new requests", lambda one: one.is_ready),
    ("running", "Requests that the worker computes", lambda one: one.reported_load.running),
    ("waiting", "Requests that wait at the worker", lambda one: one.reported_load.waiting),
    ("work_seconds", "Predicted time of all work at hand", lambda one: one.reported_load.work_ms / 1000),
    ("kv_used_blocks", "KV blocks in use", lambda one: one.reported_load.kv_used_blocks),
    ("kv_total_blocks", "KV blocks that there are", lambda one: one.reported_load.kv_total_blocks),
)
_GAUGE_NAMES = frozenset(name for name, _, _ in _GAUGES)
_COUNTER_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_COUNTER_TEXTS = {
    "embedding_cache_hits": "Pictures whose embeddings the encoder still had",
    "embedding_cache_misses": "Pictures that the encoder had to encode",
    "prefix_cache_queries": "Prompt tokens that were looked for in the prefix cache",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had",
    "preemptions": "Requests that lost their KV blocks and were computed again",
}
_OWN_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelFigures], StageStats]], ...] = (
    (
        "epd_time_to_first_token_seconds",
        "From the arrival of a request to its first token",
        lambda one: one.time_to_first_token.snapshot(),
    ),
    (
        "epd_inter_token_seconds",
        "Between two outputs of an answer, each of one token or more",
        lambda one: one.inter_token.snapshot(),
    ),
    (
        "epd_time_per_output_token_seconds",
        "Mean of an answer's tokens behind the first",
        lambda one: one.time_per_output_token.snapshot(),
    ),
)
_OWN_COUNTERS: tuple[tuple[str, str, Callable[[ModelFigures], int]], ...] = (
    ("epd_prompt_tokens", "Prompt tokens, pictures expanded", lambda one: one.prompt_tokens),
    ("epd_prompt_cached_tokens", "Prompt tokens that a prefix cache had", lambda one: one.cached_tokens),
    ("epd_completion_tokens", "Tokens that workers made", lambda one: one.completion_tokens),
)


def wants_prometheus(accept: str, form: str | None) -> bool:
    """Whether `?format=` or the Accept header asks for this form and not for the plain text."""
    if form is not None:
        return form == "prometheus"
    return "openmetrics" in accept or "version=0.0.4" in accept or "version=1.0.0" in accept


def expose(
    workers: Sequence[WorkerConnection],
    models: Mapping[Member, str],
    in_work: int,
    counters: Mapping[str, int],
    metrics: Metrics,
    accept: str,
) -> tuple[bytes, str]:
    """The figures, and their content type. Takes a while where there are many workers, so it may run on any thread.

    Args:
        workers: all that the proxy knows.
        models: what each of them serves, by its name in the API.
        in_work: requests that the proxy has in work.
        counters: what went wrong at the proxy's own address, by name.
        metrics: of the proxy's requests.
        accept: the Accept header, which chooses between the text format and OpenMetrics.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfProxy(in_work, counters, metrics))
    registry.register(_OfWorkers(workers, models))
    registry.register(ProcessCollector(registry=None))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _OfProxy(Collector):
    def __init__(self, in_work: int, counters: Mapping[str, int], metrics: Metrics) -> None:
        self._in_work = in_work
        self._own_counters = counters
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("epd_build_info", "Always 1; the version is a label", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        yield GaugeMetricFamily("epd_proxy_requests_in_work", "Requests in work at this proxy", value=self._in_work)
        own = CounterMetricFamily("epd_proxy_events", "What this proxy counted", labels=("event",))
        for event, count in list(self._own_counters.items()):
            own.add_metric((event,), count)
        yield own
        yield from self._requests()
        yield from self._models()

    def _requests(self) -> Iterator[Metric]:
        http = CounterMetricFamily(
            "epd_http_requests", "HTTP requests, all of them", labels=("endpoint", "method", "status")
        )
        for (endpoint, method, status), count in list(self._metrics.http.items()):
            http.add_metric((endpoint, method, str(status)), count)
        yield http
        outcomes = CounterMetricFamily(
            "epd_requests",
            "Requests for work by outcome: ok, client_error, overloaded, server_error, aborted, client_gone",
            labels=("model", "endpoint", "outcome"),
        )
        for labels, count in list(self._metrics.outcomes.items()):
            outcomes.add_metric(labels, count)
        yield outcomes
        seconds = HistogramMetricFamily(
            "epd_request_seconds", "From arrival to the last word", labels=("model", "endpoint")
        )
        for of_request, histogram in list(self._metrics.request_seconds.items()):
            _add(seconds, of_request, histogram.snapshot())
        yield seconds

    def _models(self) -> Iterator[Metric]:
        models = dict(self._metrics.models)
        for name, text, spread in _OWN_HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=("model",))
            for model, figures in models.items():
                _add(histogram, (model,), spread(figures))
            yield histogram
        for name, text, value in _OWN_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("model",))
            for model, figures in models.items():
                counter.add_metric((model,), value(figures))
            yield counter
        retries = CounterMetricFamily(
            "epd_retries", "Work that another worker was given, and why", labels=("model", "role", "reason")
        )
        for model, figures in models.items():
            for (role, reason), count in list(figures.retries.items()):
                retries.add_metric((model, role, reason), count)
        yield retries


class _OfWorkers(Collector):
    def __init__(self, workers: Sequence[WorkerConnection], models: Mapping[Member, str]) -> None:
        self._workers = workers
        self._models = models

    def collect(self) -> Iterator[Metric]:
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"epd_worker_{name}", text, labels=_LABELS)
            for worker in self._workers:
                gauge.add_metric(self._labels(worker), float(value(worker)))
            yield gauge
        yield self._stages()
        yield from self._counters()

    def _stages(self) -> Metric:
        """Since the worker's start."""
        stages = HistogramMetricFamily("epd_stage_seconds", "Durations of a stage", labels=(*_LABELS, "stage"))
        for worker, labels in self._labelled():
            for stage, stats in worker.stages.items():
                _add(stages, (*labels, stage), stats)
        return stages

    def _counters(self) -> Iterator[Metric]:
        """One family for each name that any worker counts under."""
        for name in sorted({name for worker in self._workers for name in worker.counters}):
            if _COUNTER_NAME.fullmatch(name) is None or name in _GAUGE_NAMES:
                continue
            text = _COUNTER_TEXTS.get(name, f"{name.replace('_', ' ').capitalize()} since the worker's start")
            counter = CounterMetricFamily(f"epd_worker_{name}", text, labels=_LABELS)
            for worker, labels in self._labelled():
                if name in worker.counters:
                    counter.add_metric(labels, worker.counters[name])
            yield counter

    def _labelled(self) -> Iterable[tuple[WorkerConnection, tuple[str, ...]]]:
        return ((worker, self._labels(worker)) for worker in self._workers)

    def _labels(self, worker: WorkerConnection) -> tuple[str, ...]:
        member = worker.member
        return member.role.value, member.address, self._models.get(member, "")


def _add(family: HistogramMetricFamily, labels: tuple[str, ...], stats: StageStats) -> None:
    """Of a worker that tells no ranges, or other ones, the sum and the count are there all the same."""
    bounds: list[str] = [str(bound / 1000) for bound in BOUNDS_MS] + ["+Inf"]
    if len(stats.buckets) != len(bounds) or sum(stats.buckets) != stats.count:
        bounds, counts = bounds[-1:], [stats.count]
    else:
        counts = list(accumulate(stats.buckets))
    family.add_metric(labels, list(zip(bounds, counts, strict=True)), stats.total_ms / 1000)
