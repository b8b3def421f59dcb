"""The scenarios of `make bench`, with a handful of payouts: what they claim is checked, and told in three ways."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ops.state import CHECKOUT


@pytest.mark.timeout(300)
def test_a_measurement_checks_what_it_measured_and_leaves_results_and_a_picture(tmp_path: Path) -> None:
    brief = ("--turns", "1", "--latency-seconds", "1", "--end-to-end-seconds", "1")
    few = ("--rates", "20", "--end-to-end-rate", "20")
    results, picture = tmp_path / "results.json", tmp_path / "results.svg"
    where = ("--json", str(results), "--picture", str(picture))
    done = subprocess.run(
        [sys.executable, "-m", "bench", "latency", "end-to-end", "--carrier", "postgresql", *brief, *few, *where],
        cwd=CHECKOUT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    latency, whole = found["latency"], found["end-to-end"]
    assert [run["who"] for run in latency["runs"]] == ["bare handler", "PostgreSQL alone"]
    assert all(told["requests"] > 0 for run in latency["runs"] for told in run["turns"])
    assert [run["failed"] + run["differing"] for run in latency["runs"]] == [0, 0]
    assert [case["name"] for case in whole["cases"]] == ["1 gateway, PostgreSQL alone", "2 gateways, PostgreSQL alone"]
    for gateways, case in enumerate(whole["cases"], 1):
        (turn,) = case["turns"]
        assert turn["lag"]["count"] == turn["told"]["requests"] > 0
        assert case["failed"] + case["differing"] == 0
        running = turn["costs"]["cpu_ms"].keys()
        assert all(f"gateway-{n}" in running for n in range(1, gateways + 1))
        assert f"gateway-{gateways + 1}" not in running
        assert {"settle", "callbacks", "PostgreSQL"} <= running
    assert latency["broken"] == whole["broken"] == []
    assert ET.parse(picture).getroot().tag.endswith("svg")
    assert "lost, doubled or wrong" in done.stdout
