"""The files of `deploy/` as tests read them, and what of the product they may name."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import yaml
from prometheus_client import REGISTRY

import gateway.app  # noqa: F401 it registers metrics
import worker.app
from common.messaging.topology import Topology
from common.settings import Settings
from tests.stack import ROOT

DEPLOY: Final = ROOT / "deploy"
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS: Final = frozenset(PROJECT["project"]["scripts"])
SETTINGS: Final = {item.metadata["setting"].variable: item.metadata["setting"] for item in fields(Settings)}
REQUIRED: Final = frozenset(name for name, setting in SETTINGS.items() if setting.default is None)
TOPOLOGY: Final = Topology("", 1)
# Every process serves these; merchants' requests come to the gateway's port.
ADMIN_PORT: Final = 9090
GATEWAY_PORT: Final = 8080
PROCESSES: Final = {"gateway": ["payouts-gateway"]} | {role: ["payouts-worker", role] for role in worker.app.ROLES}

# A release by its numbers, or a digest: what is pulled tomorrow is what was looked at.
_PINNED: Final = re.compile(r".+(:[a-z]*[0-9]+\.[0-9]+(\.[0-9]+)?(-[a-z0-9.-]+)?|@sha256:[0-9a-f]{64})", re.ASCII)
_SUFFIXES: Final = {"counter": ("_total",), "histogram": ("_count", "_sum", "_bucket")}
_METRIC: Final = re.compile(r"\b(?:payouts|process|rabbitmq)_[a-z_]+")


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(names) == len(set(names)), f"a key twice: {node.start_mark}"
        return super().construct_mapping(node, deep)


def load_all(path: str) -> list[Any]:
    """The documents of a YAML file of `deploy/`."""
    return list(yaml.load_all((DEPLOY / path).read_text(), _UniqueKeys))


def load(path: str) -> Any:
    """The only document of such a file."""
    (document,) = load_all(path)
    return document


def image_environment() -> dict[str, str]:
    """The variables that our image sets."""
    last_stage = re.sub(r"\s*\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text()).rpartition("\nFROM ")[2]
    (text,) = re.findall(r"^ENV (.*)$", last_stage, re.MULTILINE)
    return dict(pair.split("=", 1) for pair in text.split())


def is_pinned(image: str) -> bool:
    """Whether an image is named by a release or a digest."""
    return _PINNED.fullmatch(image) is not None


def metrics_in(query: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    return set(_METRIC.findall(query))


def product_metrics() -> set[str]:
    """The names under which Prometheus sees what our processes tell."""
    return {f"{metric.name}{suffix}" for metric in REGISTRY.collect() for suffix in _SUFFIXES.get(metric.type, ("",))}


def walk(document: Any) -> Iterator[Any]:
    """Every mapping of a document, at any depth."""
    if isinstance(document, dict):
        yield document
        for value in document.values():
            yield from walk(value)
    elif isinstance(document, list):
        for value in document:
            yield from walk(value)
