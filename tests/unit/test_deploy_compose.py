"""`deploy/compose.yaml`: true to the schema of Compose and to the product, and nobody has more than it needs."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

import jsonschema
import pytest
from yarl import URL

from common.settings import Settings, SettingsInvalid
from ops.cli.options import find_actor
from tests.deployment import (
    ADMIN_PORT,
    DEPLOY,
    GATEWAY_PORT,
    PROCESSES,
    PROJECT,
    REQUIRED,
    SCRIPTS,
    SETTINGS,
    TOPOLOGY,
    image_environment,
    is_pinned,
    load,
)
from tests.stack import ROOT

COMPOSE: Final[dict[str, Any]] = load("compose.yaml")
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = {name for name, service in SERVICES.items() if service["image"].startswith("${PAYOUTS_IMAGE")}
PEOPLE: Final = frozenset({"operator", "custodian"})
ONCE: Final = PEOPLE | {"prepare", "migrate"}
_VARIABLE: Final = re.compile(r"\$\{([A-Z_]+)(?::([-?])([^}]*))?\}")


def run(script: str, **variables: str) -> str:
    """What a script of `deploy/` prints."""
    done = subprocess.run([sys.executable, DEPLOY / script], env=variables, capture_output=True, text=True, check=True)
    return done.stdout


def make_env() -> dict[str, str]:
    """What Compose reads of a new `.env`."""
    return dict(line.split("=", 1) for line in run("make_env.py").splitlines())


def fill(text: str, variables: Mapping[str, str]) -> str:
    """What Compose makes of a value: `${NAME}`, `${NAME:-default}` and `${NAME:?complaint}`."""

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        if operator == "?":
            return variables[name]
        return variables.get(name) or rest or ""

    return _VARIABLE.sub(value, text)


def environment(service: str, variables: Mapping[str, str]) -> dict[str, str]:
    """What a service of ours sees, with what the image says."""
    given = SERVICES[service]["environment"]
    return image_environment() | {name: fill(value, variables) for name, value in given.items()}


def test_it_is_true_to_the_schema_of_compose() -> None:
    schema = files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json").read_text()
    validator = jsonschema.validators.validator_for(json.loads(schema))(json.loads(schema))

    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    broken = COMPOSE | {"services": {"gateway": SERVICES["gateway"] | {"no_such_key": 1}}}
    assert list(validator.iter_errors(broken)) != [], "the schema sees mistakes"


def test_every_role_runs_and_every_command_exists() -> None:
    assert {name: SERVICES[name]["command"] for name in PROCESSES} == PROCESSES
    assert set(PROCESSES) | ONCE == OURS
    assert {SERVICES[name]["command"][0] for name in OURS - {"prepare"}} == SCRIPTS
    assert SERVICES["migrate"]["command"] == ["payouts", "migrate"]
    for name in PROCESSES:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for name in ("postgres", "rabbitmq"):
        assert SERVICES[name]["depends_on"]["prepare"] == {"condition": "service_completed_successfully"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_nobody_may_do_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "devices", "pid", "ipc", "container_name"}
    assert service["mem_limit"]
    assert service["pids_limit"]
    if name == "prepare":
        assert service["network_mode"] == "none", "root meets nobody"
        assert service["cap_add"] == ["CHOWN", "DAC_OVERRIDE"]
    else:
        assert re.fullmatch(r"[1-9][0-9]*:[0-9]+", service["user"])
        assert "cap_add" not in service
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), "a proxy that ends TLS stands before what others reach"
    assert not [volume for volume in service.get("volumes", ()) if "docker.sock" in volume]


def test_every_image_is_a_release() -> None:
    default = f"payouts:{PROJECT['project']['version']}"
    assert {fill(SERVICES[name]["image"], {}) for name in OURS} == {default}
    assert [image for service in SERVICES.values() if not is_pinned(image := fill(service["image"], {}))] == []


def test_networks_let_meet_only_those_who_have_to() -> None:
    members: dict[str, set[str]] = {network: set() for network in COMPOSE["networks"]}
    for name, service in SERVICES.items():
        for network in service.get("networks", ()):
            members[network].add(name)

    assert members == {
        "database": {"postgres", "backup", "migrate", "operator", "custodian", *PROCESSES},
        "broker": {"rabbitmq", "operator", *PROCESSES},
        "metrics": {"rabbitmq", "prometheus", *PROCESSES},
        "merchants": {"gateway"},
        "operators": {"prometheus", "grafana"},
        "outside": {"settle", "callbacks", "custodian"},
    }
    assert {name for name, network in COMPOSE["networks"].items() if network.get("internal")} == {
        *("database", "broker", "metrics")
    }


def test_what_is_mounted_is_there_and_every_volume_is_declared() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source, _, mode = (*volume.split(":"), "")[:3]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], volume
            assert mode == "ro" or not source.startswith("./"), f"{name} may not write to {source}"


@pytest.mark.parametrize("name", sorted(OURS - {"prepare"}))
def test_its_settings_are_settings_and_production_takes_them(name: str) -> None:
    """With what `make_env.py` makes; every setting that must be set is set, but where no keys are needed."""
    given = environment(name, make_env())
    ours = {variable: value for variable, value in given.items() if variable in SETTINGS}
    assert {variable for variable in given if variable.startswith("PAYOUTS_")} <= SETTINGS.keys()
    if name == "migrate":
        assert ours.keys() & REQUIRED == {"DATABASE_URL"}, "who makes the schema needs no keys"
        keys = {key: value for key, value in environment("gateway", make_env()).items() if key in REQUIRED}
        ours = keys | ours
    settings = Settings.from_environ(ours)

    assert settings.environment == "production"
    assert (settings.port, settings.admin_port) == (GATEWAY_PORT, ADMIN_PORT)
    assert URL(settings.database_url).host == "postgres"
    assert {URL(url).host for url in settings.amqp_urls} <= {"rabbitmq"}
    patience = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert settings.drain_seconds < patience


def test_production_does_not_take_what_nobody_made() -> None:
    """Whoever writes `.env` by hand, from an example, is told."""
    example = dict.fromkeys(make_env(), "change-me-change-me-change-me")
    example |= {"PAYOUTS_MASTER_KEYS": f"1:{'A' * 43}=", "PAYOUTS_CONTENT_KEY": f"{'A' * 43}="}
    with pytest.raises(SettingsInvalid) as refused:
        Settings.from_environ({k: v for k, v in environment("gateway", example).items() if k in SETTINGS})

    said = {part.partition(":")[0] for part in str(refused.value).split("; ")}
    assert said == {"DATABASE_URL", "AMQP_URL", "PAYOUTS_MASTER_KEYS", "PAYOUTS_CONTENT_KEY"}


def test_every_secret_is_made_and_none_is_written_down() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    demanded = {found[1] for found in _VARIABLE.finditer(text) if found[2] == "?"}
    assert demanded == make_env().keys()
    assert not [
        (name, variable)
        for name, service in SERVICES.items()
        for variable, value in service.get("environment", {}).items()
        if re.search("PASSWORD|_KEYS?$", variable) and not _VARIABLE.fullmatch(value)
    ]
    first, second = make_env(), make_env()
    assert not set(first.values()) & set(second.values())
    assert "/deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_each_process_has_a_login_of_its_own_in_both_servers() -> None:
    made = make_env()
    logins = {
        name: {URL(environment(name, made)[variable]).user for variable in ("DATABASE_URL", "AMQP_URL")}
        for name in PROCESSES
    }
    assert logins == {"gateway": {"payouts-gateway"}} | {
        role: {"payouts-worker"} for role in PROCESSES if role != "gateway"
    }
    for name, login in (("migrate", "migrate"), ("operator", "ops"), ("custodian", "custodian")):
        assert URL(environment(name, made)["DATABASE_URL"]).user == f"payouts-{login}"

    rabbitmq = {user["name"] for user in json.loads(run("rabbitmq/users.py", **rabbitmq_passwords(made)))["users"]}
    postgresql = set(
        re.findall(r'^ALTER ROLE "([a-z-]+)" PASSWORD', (DEPLOY / "postgresql/logins.sql").read_text(), re.MULTILINE)
    )
    assert rabbitmq == {"payouts-gateway", "payouts-worker", "payouts-ops"}
    assert postgresql == rabbitmq | {"payouts-migrate", "payouts-custodian"}
    for name, service in SERVICES.items():
        for variable in ("DATABASE_URL", "AMQP_URL"):
            if variable in service.get("environment", {}):
                url = URL(environment(name, made)[variable])
                known = postgresql if variable == "DATABASE_URL" else rabbitmq
                assert url.user in known
                assert url.path == "/payouts"
    (hba,) = re.findall(r"^hostssl\s+payouts\s+(\S+)", (DEPLOY / "postgresql/pg_hba.conf").read_text(), re.MULTILINE)
    assert set(hba.split(",")) == postgresql
    given = {name for name in SERVICES["postgres"]["environment"] if name.endswith("_PASSWORD")} - {"POSTGRES_PASSWORD"}
    made_for = {f"payouts-{name.removesuffix('_PASSWORD').lower()}" for name in given}
    assert made_for == postgresql | {"payouts-backup"}


@pytest.mark.parametrize("name", sorted(PEOPLE))
def test_whoever_runs_a_command_is_known_by_the_name_that_they_have_outside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the container there is no account to ask: without a name a changing command wants `--actor`."""
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    for variable in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    who: dict[tuple[str, ...], str | None] = {}
    for outside in ({}, {"USER": "anna"}, {"USER": "root", "SUDO_USER": "bela"}):
        for variable, value in environment(name, make_env() | outside).items():
            if variable in ("USER", "SUDO_USER"):
                monkeypatch.setenv(variable, value)
        who[tuple(outside)] = find_actor()

    assert who == {(): None, ("USER",): "anna", ("USER", "SUDO_USER"): "bela"}


def test_the_archive_and_backups_are_on_volumes_that_their_servers_may_write_to() -> None:
    """The paths that `deploy/README.md` and `restore.md` name."""
    (script,) = (part for part in SERVICES["prepare"]["command"] if "certificates.py" in part)
    assert "chown 999:999 /made/archive /made/backups" in script
    assert {"archive:/made/archive", "backups:/made/backups"} <= set(SERVICES["prepare"]["volumes"])
    postgres, backup = SERVICES["postgres"], SERVICES["backup"]
    assert postgres["image"] == backup["image"], "a backup is verified by the programs that made it"
    assert postgres["user"] == backup["user"] == "999:999"
    assert {"postgres-data:/var/lib/postgresql", "archive:/archive", "backups:/backups:ro"} <= set(postgres["volumes"])
    assert {"archive:/archive", "backups:/backups"} <= set(backup["volumes"])
    assert "./postgresql:/etc/postgresql:ro" in {*postgres["volumes"]} & {*backup["volumes"]}
    scripts = re.findall(r"/etc/postgresql/([a-z_.]+)", " ".join([*postgres["command"], *backup["command"]]))
    assert scripts == ["pg_hba.conf", "archive.sh", "backup.sh", "prune.sh"]
    assert all((DEPLOY / "postgresql" / script).exists() for script in scripts)
    assert {"archive_mode=on", "archive_timeout=60"} <= set(postgres["command"])
    (version,) = re.findall(r"postgres:([0-9]+)\.", postgres["image"])
    assert f"`/var/lib/postgresql/{version}/docker`" in (DEPLOY / "README.md").read_text(), (
        "where the image has its data"
    )


def rabbitmq_passwords(made: Mapping[str, str]) -> dict[str, str]:
    """What `users.py` sees."""
    return {name: fill(value, made) for name, value in SERVICES["prepare"]["environment"].items()}


def test_the_virtual_host_and_the_queues_are_those_of_the_definitions() -> None:
    definitions = json.loads((DEPLOY / "rabbitmq/definitions.json").read_text())
    assert [vhost["name"] for vhost in definitions["vhosts"]] == ["payouts"]
    assert {queue["name"] for queue in definitions["queues"]} == set(TOPOLOGY.all_queues())
    assert "PAYOUTS_AMQP_SHARDS" not in SERVICES["gateway"]["environment"]


def test_servers_find_what_is_made_for_them() -> None:
    """Paths and names on both sides of each mount."""
    (script,) = (part for part in SERVICES["prepare"]["command"] if "certificates.py" in part)
    (servers,) = re.findall(r"certificates\.py /made (.*)$", script, re.MULTILINE)
    assert servers.split() == ["postgres", "rabbitmq"]
    for server in servers.split():
        assert f"{server}-tls:/made/{server}" in SERVICES["prepare"]["volumes"]
        assert f"{server}-tls:/run/tls:ro" in SERVICES[server]["volumes"]
    assert {"ssl_cert_file=/run/tls/certificate.pem", "ssl_key_file=/run/tls/key.pem"} <= set(
        SERVICES["postgres"]["command"]
    )
    tls = dict(line.split(" = ") for line in (DEPLOY / "rabbitmq/tls.conf").read_text().splitlines() if " = " in line)
    assert tls["ssl_options.certfile"] == "/run/tls/certificate.pem"
    assert tls["ssl_options.keyfile"] == "/run/tls/key.pem"
    assert tls["load_definitions"] == "/run/tls/definitions.json"
    assert tls["listeners.tcp"] == "none"
    assert SERVICES["rabbitmq"]["healthcheck"]["test"][-1] == tls["listeners.ssl.default"]
    assert SERVICES["rabbitmq"]["hostname"] == "rabbitmq"
