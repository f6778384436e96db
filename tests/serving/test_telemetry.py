"""Metrics for Prometheus, and statistics in the form of Triton."""

from __future__ import annotations

from aoft_deploy.serving.telemetry.metrics import Counter, Histogram, exposition, gauge
from aoft_deploy.serving.telemetry.statistics import MAX_MODELS, Statistics


def test_metrics_read_as_prometheus_writes_them() -> None:
    counter = Counter("a_total", "Count.", ("model",))
    counter.add('x"\\\ny')
    counter.add("b", amount=2.5)
    histogram = Histogram("b_seconds", "Time.", ("stage",), (0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value, "s")
    level = gauge("c", "Level.", (), {(): 3.0})
    assert exposition([counter.lines(), histogram.lines(), level]).splitlines() == [
        "# HELP a_total Count.",
        "# TYPE a_total counter",
        r'a_total{model="x\"\\\ny"} 1',
        'a_total{model="b"} 2.5',
        "# HELP b_seconds Time.",
        "# TYPE b_seconds histogram",
        'b_seconds_bucket{stage="s",le="0.1"} 2',
        'b_seconds_bucket{stage="s",le="1"} 3',
        'b_seconds_bucket{stage="s",le="+Inf"} 4',
        'b_seconds_sum{stage="s"} 7.65',
        'b_seconds_count{stage="s"} 4',
        "# HELP c Level.",
        "# TYPE c gauge",
        "c 3",
    ]


def test_statistics_count_requests_batches_and_nanoseconds() -> None:
    statistics = Statistics()
    statistics["a"].succeeded(2, 5, True, (1, 2, 3, 4))
    statistics["a"].succeeded(1, 5, False, (1, 2, 3, 4))
    statistics["a"].failed(7)
    report = statistics["a"].report("a")
    assert (report["inference_count"], report["execution_count"]) == (3, 1)
    assert report["inference_stats"]["success"] == {"count": 2, "ns": 20}
    assert report["inference_stats"]["fail"] == {"count": 1, "ns": 7}
    (batch,) = report["batch_stats"]
    assert batch["batch_size"] == 5 and batch["compute_infer"] == {"count": 1, "ns": 3}
    for i in range(MAX_MODELS + 5):
        statistics[f"m{i}"].failed(1)
    assert len(statistics) == MAX_MODELS and "a" not in statistics
