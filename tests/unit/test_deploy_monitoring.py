"""Prometheus and Grafana: every alarm and every picture is of a metric that the product has."""

import json
import re
from typing import Any, Final

import pytest

from tests.deployment import ADMIN_PORT, DEPLOY, PROCESSES, load, metrics_in, product_metrics

ALERTS: Final[list[dict[str, Any]]] = [
    rule for group in load("prometheus/alerts.yaml")["groups"] for rule in group["rules"]
]
DASHBOARD: Final = json.loads((DEPLOY / "grafana/dashboards/payouts.json").read_text())
QUERIES: Final = [rule["expr"] for rule in ALERTS] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]
# What a RabbitMQ tells of its queues; tests/integration/test_deploy_servers.py asks one.
RABBITMQ_METRIC: Final = "rabbitmq_detailed_queue_messages"


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_that_is_asked_for_exists(query: str) -> None:
    named = metrics_in(query)
    assert named or re.search(r"\bup\b", query)
    assert named - {RABBITMQ_METRIC} <= product_metrics()


def test_what_must_never_be_is_alarmed_on() -> None:
    paged = {metric for rule in ALERTS if rule["labels"]["severity"] == "page" for metric in metrics_in(rule["expr"])}
    assert paged >= {
        "payouts_invariant_offenders",
        "payouts_oldest_due_payout_age_seconds",
        "payouts_oldest_due_callback_age_seconds",
    }
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    assert all(rule["annotations"]["summary"] for rule in ALERTS)


def test_prometheus_asks_every_process_where_it_answers() -> None:
    configuration = load("prometheus/prometheus.yaml")
    ours, rabbitmq = configuration["scrape_configs"]
    (lookup,) = ours["dns_sd_configs"]
    assert set(lookup["names"]) == set(PROCESSES)
    assert lookup["port"] == ADMIN_PORT
    # By this job and this label an alarm knows that no gateway is there.
    assert ours["job_name"] == "payouts"
    assert ours["relabel_configs"] == [{"source_labels": ["__meta_dns_name"], "target_label": "role"}]
    assert ours.get("metrics_path", "/metrics") == "/metrics"
    assert rabbitmq["metrics_path"] == "/metrics/detailed"
    (rules,) = configuration["rule_files"]
    assert (DEPLOY / "prometheus" / rules.rpartition("/")[2]).exists()


def test_alarms_go_to_an_alertmanager_when_there_is_one() -> None:
    (alertmanager,) = load("prometheus/prometheus.yaml")["alerting"]["alertmanagers"]
    (lookup,) = alertmanager["dns_sd_configs"]
    # By a lookup that finds nobody; what is named in static_configs is taken to be there, and every alarm is an error.
    assert (lookup["names"], lookup["type"], lookup["port"]) == (["alertmanager"], "A", 9093)


def test_grafana_knows_where_its_pictures_get_their_data() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    services = load("compose.yaml")["services"]
    (provider,) = load("grafana/provisioning/dashboards/payouts.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert source["url"] == "http://prometheus:9090"
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
