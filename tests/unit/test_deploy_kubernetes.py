"""`deploy/kubernetes`: true to the schemas of Kubernetes and to the product, and nobody has more than it needs."""

import base64
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

import kubernetes_validate
import pytest

from common.messaging.topology import Topology, Work
from common.settings import Settings
from tests.deployment import (
    ADMIN_PORT,
    DEPLOY,
    GATEWAY_PORT,
    PROCESSES,
    PROJECT,
    REQUIRED,
    SETTINGS,
    image_environment,
    is_pinned,
    load,
    load_all,
    metrics_in,
    product_metrics,
    walk,
)

VERSION: Final = "1.34"
KUSTOMIZATION: Final[dict[str, Any]] = load("kubernetes/kustomization.yaml")
DOCUMENTS: Final[list[dict[str, Any]]] = [
    document for name in KUSTOMIZATION["resources"] for document in load_all(f"kubernetes/{name}")
]
COMPONENT: Final = "app.kubernetes.io/component"
# Where people run commands, when they ask for it.
PEOPLE: Final = frozenset({"operator", "custodian"})
# Custom resources, for which no package carries a schema: what KEDA reads of them. Source: KEDA, "ScaledObject specification".
KEDA: Final = {"ScaledObject", "TriggerAuthentication"}


def of(kind: str) -> dict[str, dict[str, Any]]:
    """The resources of a kind, by name."""
    return {document["metadata"]["name"]: document for document in DOCUMENTS if document["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    """The templates of all pods, by what makes them."""
    return {name: made["spec"]["template"] for kind in ("Deployment", "Job") for name, made in of(kind).items()}


def container(name: str) -> dict[str, Any]:
    """The only container of a pod."""
    (only,) = pods()[name]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def _random_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


# As deploy/README.md has operators make them.
SECRETS: Final = {
    "payouts-keys": {
        "PAYOUTS_MASTER_KEYS": f"1:{_random_key()}",
        "PAYOUTS_CONTENT_KEY": _random_key(),
    },
    "payouts-gateway": {"DATABASE_URL": "postgresql://db/p?sslmode=verify-full", "AMQP_URL": "amqps://mq/payouts"},
    "payouts-worker": {"DATABASE_URL": "postgresql://db/p?sslmode=verify-full", "AMQP_URL": "amqps://mq/payouts"},
    "payouts-migrate": {"DATABASE_URL": "postgresql://db/p?sslmode=verify-full"},
    "payouts-ops": {"DATABASE_URL": "postgresql://db/p?sslmode=verify-full", "AMQP_URL": "amqps://mq/payouts"},
    "payouts-custodian": {"DATABASE_URL": "postgresql://db/p?sslmode=verify-full"},
    "payouts-scaling": {"host": "amqps://mq/payouts", "tls": "enable", "ca": "-----BEGIN CERTIFICATE-----"},
}


def environment(name: str) -> dict[str, str]:
    """What the container sees, with what the image says and secrets as deploy/README.md describes them."""
    seen = image_environment()
    for source in container(name)["envFrom"]:
        if "configMapRef" in source:
            seen |= of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        else:
            seen |= SECRETS[source["secretRef"]["name"]]
    for variable in container(name)["env"]:
        secret = variable["valueFrom"]["secretKeyRef"]
        seen[variable["name"]] = SECRETS[secret["name"]][secret["key"]]
    return seen


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels. Source: Kubernetes, "Labels and Selectors"."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def selected(selector: Mapping[str, Any]) -> set[str]:
    """The pods of ours that it takes."""
    return {name for name, pod in pods().items() if selects(selector, pod["metadata"]["labels"])}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda made: f"{made['kind']} {made['metadata']['name']}")
def test_it_is_true_to_the_schema_of_kubernetes(document: dict[str, Any]) -> None:
    if document["kind"] in KEDA:
        assert document["apiVersion"] == "keda.sh/v1alpha1"
        return
    kubernetes_validate.validate(document, VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document | {"no_such_key": 1}, VERSION, strict=True)


def test_every_file_is_a_resource_of_the_kustomization() -> None:
    there = {path.name for path in (DEPLOY / "kubernetes").iterdir()} - {"kustomization.yaml"}
    assert there == set(KUSTOMIZATION["resources"])
    names = [(document["kind"], document["metadata"]["name"]) for document in DOCUMENTS]
    assert len(names) == len(set(names))
    assert KUSTOMIZATION["namespace"] in of("Namespace")
    (labels,) = KUSTOMIZATION["labels"]
    assert not labels.get("includeSelectors"), "selectors cannot change once they are there"


def test_the_image_is_a_release_of_ours() -> None:
    (image,) = KUSTOMIZATION["images"]
    assert {container(name)["image"] for name in pods()} == {image["name"]}
    assert image["newTag"] == PROJECT["project"]["version"]
    assert is_pinned(f"{image['newName']}:{image['newTag']}")


def test_every_role_runs_and_every_command_exists() -> None:
    commands = {name: container(name)["command"] for name in of("Deployment")}
    assert commands == PROCESSES | {name: ["sleep", "infinity"] for name in PEOPLE}
    assert {name: container(name)["command"] for name in of("Job")} == {"migrate": ["payouts", "migrate"]}


@pytest.mark.parametrize("name", sorted(pods()))
def test_nobody_may_do_more_than_it_needs(name: str) -> None:
    spec = pods()[name]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False, "PAYOUTS_… of a service would be refused as a setting"
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {*container(name)["resources"]["requests"]} == {"cpu", "memory"}
    assert "memory" in container(name)["resources"]["limits"]
    assert of("Namespace")["payouts"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", sorted(pods()))
def test_its_settings_are_settings_and_production_takes_them(name: str) -> None:
    seen = environment(name)
    ours = {variable: value for variable, value in seen.items() if variable in SETTINGS}
    assert {variable for variable in seen if variable.startswith("PAYOUTS_")} <= SETTINGS.keys()
    if name == "migrate":
        assert ours.keys() & REQUIRED == {"DATABASE_URL"}, "who makes the schema needs no keys"
        ours |= SECRETS["payouts-keys"]
    settings = Settings.from_environ(ours)

    assert settings.environment == "production"
    assert (settings.port, settings.admin_port) == (GATEWAY_PORT, ADMIN_PORT)
    assert bool(settings.amqp_urls) == (name not in ("migrate", "custodian"))


def test_a_process_has_no_login_but_its_own() -> None:
    used = {
        name: {secret["name"] for part in walk(pod) if (secret := part.get("secretKeyRef"))}
        for name, pod in pods().items()
    }
    assert used == {
        "gateway": {"payouts-gateway"},
        "migrate": {"payouts-migrate"},
        "operator": {"payouts-ops"},
        "custodian": {"payouts-custodian"},
        **{role: {"payouts-worker"} for role in ("settle", "callbacks", "sweep")},
    }
    assert not of("Secret"), "secrets are not written down"


def test_what_secrets_hold_is_what_the_readme_says_to_make() -> None:
    _, _, rest = (DEPLOY / "README.md").read_text().partition("\n## In a cluster\n")
    said = dict(re.findall(r"^\| `(payouts-[a-z]+)` \| (.*?) \|", rest.partition("\n## ")[0], re.MULTILINE))
    assert {name: set(re.findall("`([A-Za-z_]+)`", keys)) for name, keys in said.items() if name in SECRETS} == {
        name: set(keys) for name, keys in SECRETS.items()
    }


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_probes_ask_what_the_admin_port_answers(name: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    assert ports == {"admin": ADMIN_PORT} | ({"http": GATEWAY_PORT} if name == "gateway" else {})
    asked = {probe: container(name)[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/livez", "port": "admin"},
        "liveness": {"path": "/livez", "port": "admin"},
        "readiness": {"path": "/readyz?exclude=database", "port": "admin"},
    }


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_whoever_leaves_is_given_the_time_to_end_what_it_began(name: str) -> None:
    drain_seconds = Settings.from_environ(
        {variable: value for variable, value in environment(name).items() if variable in SETTINGS}
    ).drain_seconds
    before = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert before + drain_seconds + 5 <= pods()[name]["spec"]["terminationGracePeriodSeconds"]
    assert (before > 0) == (name == "gateway"), "only to the gateway somebody sends requests"


@pytest.mark.parametrize("kind", ["Deployment", "PodDisruptionBudget", "Service"])
def test_every_selector_takes_its_own_pods_and_no_others(kind: str) -> None:
    expected = {
        "Deployment": PROCESSES.keys() | PEOPLE,
        "PodDisruptionBudget": PROCESSES.keys(),
        "Service": {"gateway"},
    }
    assert of(kind).keys() == expected[kind]
    for name, made in of(kind).items():
        selector = made["spec"]["selector"]
        assert selected({"matchLabels": selector} if kind == "Service" else selector) == {name}
    for name in PROCESSES:
        (spread,) = pods()[name]["spec"]["topologySpreadConstraints"]
        assert selected(spread["labelSelector"]) == {name}


def replicas(at: int) -> dict[str, int]:
    """How many of each process there are: at least (0), at most (1). Each is scaled by one thing."""
    fixed = {name: (n, n) for name, made in of("Deployment").items() if (n := made["spec"].get("replicas"))}
    by_cpu = {
        made["spec"]["scaleTargetRef"]["name"]: (made["spec"]["minReplicas"], made["spec"]["maxReplicas"])
        for made in of("HorizontalPodAutoscaler").values()
    }
    by_age = {
        made["spec"]["scaleTargetRef"]["name"]: (made["spec"]["minReplicaCount"], made["spec"]["maxReplicaCount"])
        for made in of("ScaledObject").values()
    }
    assert sorted([*fixed, *by_cpu, *by_age]) == sorted(PROCESSES)
    return {name: bounds[at] for name, bounds in (fixed | by_cpu | by_age).items()}


def test_nobody_waits_for_people_who_have_not_asked() -> None:
    assert {name: of("Deployment")[name]["spec"]["replicas"] for name in PEOPLE} == dict.fromkeys(PEOPLE, 0)


def test_a_disruption_takes_one_at_a_time_and_never_the_last() -> None:
    for name, budget in of("PodDisruptionBudget").items():
        assert 0 < budget["spec"]["maxUnavailable"] < replicas(0)[name]


def test_connections_of_all_replicas_fit_what_the_readme_asks_of_the_database() -> None:
    pool = int(of("ConfigMap")["payouts-settings"]["data"]["PAYOUTS_DATABASE_POOL_MAX"])
    surge = sum(of("Deployment")[name]["spec"]["strategy"]["rollingUpdate"]["maxSurge"] for name in PROCESSES)
    (asked,) = re.findall(r"`max_connections` of at least ([0-9]+)", (DEPLOY / "README.md").read_text())

    assert pool * (sum(replicas(1).values()) + surge + len(PEOPLE)) <= int(asked)


def test_workers_scale_on_the_oldest_due_work_and_on_their_queues() -> None:
    shards = int(of("ConfigMap")["payouts-settings"]["data"]["PAYOUTS_AMQP_SHARDS"])
    topology = Topology("", shards)
    expected = {
        "settle": ("payouts_oldest_due_payout_age_seconds", Work.SETTLE),
        "callbacks": ("payouts_oldest_due_callback_age_seconds", Work.CALLBACK),
    }
    assert of("ScaledObject").keys() == expected.keys()
    for name, (metric, work) in expected.items():
        scaled = of("ScaledObject")[name]["spec"]
        assert scaled["scaleTargetRef"]["name"] == name
        age, *queues = scaled["triggers"]
        assert (age["type"], age["metricType"]) == ("prometheus", "Value")
        assert metrics_in(age["metadata"]["query"]) == {metric} <= product_metrics()
        assert age["metadata"]["serverAddress"].startswith("http://")
        assert all(isinstance(value, str) for trigger in scaled["triggers"] for value in trigger["metadata"].values())
        assert [queue["metadata"]["queueName"] for queue in queues] == topology.queues(work)
        for queue in queues:
            assert (queue["type"], queue["metadata"]["mode"]) == ("rabbitmq", "QueueLength")
            assert queue["authenticationRef"]["name"] in of("TriggerAuthentication")
        assert 0 < scaled["minReplicaCount"] < scaled["maxReplicaCount"]
        assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    for authentication in of("TriggerAuthentication").values():
        for reference in authentication["spec"]["secretTargetRef"]:
            assert reference["key"] in SECRETS[reference["name"]]


def test_nobody_meets_anybody_but_whom_they_have_to() -> None:
    """Which of our pods each policy opens, and to which ports; what no policy opens stays shut."""
    policies = {name: made["spec"] for name, made in of("NetworkPolicy").items()}
    assert policies.pop("nobody") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    opened = {
        name: (
            selected(policy["podSelector"]),
            {port["port"] for part in walk(policy) for port in part.get("ports", ())},
        )
        for name, policy in policies.items()
    }

    assert opened == {
        "names": (set(pods()), {53}),
        "merchants-to-gateway": ({"gateway"}, {GATEWAY_PORT}),
        "monitoring": (set(pods()), {ADMIN_PORT}),
        "database": (set(pods()), {5432}),
        "broker": ({*PROCESSES, "operator"}, {5671}),
        "banks-and-merchants": ({"settle", "callbacks", "custodian"}, {443, 8443}),
    }
    for name, policy in policies.items():
        (direction,) = policy["policyTypes"]
        rules = policy[direction.lower()]
        sides = [side for rule in rules for side in rule["to" if direction == "Egress" else "from"]]
        assert sides, f"{name}: no side would mean everybody"
        assert all(side for side in sides)


def test_the_way_out_of_callbacks_opens_exactly_the_ports_that_the_settings_allow() -> None:
    settings = of("ConfigMap")["payouts-settings"]["data"]
    policy = of("NetworkPolicy")["banks-and-merchants"]["spec"]
    (rule,) = policy["egress"]
    assert {str(port["port"]) for port in rule["ports"]} == set(settings["PAYOUTS_CALLBACK_PORTS"].split(","))
    inside = {network for side in rule["to"] for network in side["ipBlock"]["except"]}
    assert inside >= {
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "127.0.0.0/8",
        "fc00::/7",
        "fe80::/10",
    }
