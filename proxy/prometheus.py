"""The figures of `/metrics` in the form that Prometheus reads.

Format: https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md. Everything but the
proxy's own numbers is what workers last said of themselves; each proxy tells it of each worker, so take the `max by
(address)` over proxies before summing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from proxy.worker_connection import WorkerConnection

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


def wants_prometheus(accept: str, form: str | None) -> bool:
    """Whether `?format=` or the Accept header asks for this form and not for the plain text."""
    if form is not None:
        return form == "prometheus"
    return "openmetrics" in accept or "version=0.0.4" in accept or "version=1.0.0" in accept


def expose(
    workers: Sequence[WorkerConnection], in_work: int, counters: Mapping[str, int], accept: str
) -> tuple[bytes, str]:
    """The figures, and their content type.

    Args:
        workers: all that the proxy knows.
        in_work: requests that the proxy has in work.
        counters: what the proxy itself counted, by name.
        accept: the Accept header, which chooses between the text format and OpenMetrics.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(workers, in_work, counters))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Figures(Collector):
    def __init__(self, workers: Sequence[WorkerConnection], in_work: int, counters: Mapping[str, int]) -> None:
        self._workers = workers
        self._in_work = in_work
        self._own_counters = counters

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("epd_proxy_requests_in_work", "Requests in work at this proxy", value=self._in_work)
        own = CounterMetricFamily("epd_proxy_events", "What this proxy counted", labels=("event",))
        for event, count in self._own_counters.items():
            own.add_metric((event,), count)
        yield own
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"epd_worker_{name}", text, labels=_LABELS)
            for worker in self._workers:
                gauge.add_metric(_labels(worker), float(value(worker)))
            yield gauge
        yield self._stages()
        yield self._counters()

    def _stages(self) -> Metric:
        """Sums since the worker's start."""
        stages = SummaryMetricFamily("epd_stage_seconds", "Durations of a stage", labels=(*_LABELS, "stage"))
        for worker, labels in self._labelled():
            for stage, stats in worker.stages.items():
                stages.add_metric((*labels, stage), stats.count, stats.total_ms / 1000)
        return stages

    def _counters(self) -> Metric:
        counters = CounterMetricFamily("epd_worker_events", "What a worker counted", labels=(*_LABELS, "event"))
        for worker, labels in self._labelled():
            for event, count in worker.counters.items():
                counters.add_metric((*labels, event), count)
        return counters

    def _labelled(self) -> Iterable[tuple[WorkerConnection, tuple[str, ...]]]:
        return ((worker, _labels(worker)) for worker in self._workers)


def _labels(worker: WorkerConnection) -> tuple[str, ...]:
    model = "" if worker.info is None else worker.info.served_model_name or worker.info.model
    return worker.member.role.value, worker.member.address, model
