"""`deploy/Dockerfile`: one image, pinned, built of what the locks name, run by a user that is not root."""

import re
from fnmatch import fnmatch
from typing import Final

from common.settings import PRODUCTION
from tests.deployment import ADMIN_PORT, DEPLOY, GATEWAY_PORT, PROJECT, SCRIPTS, SETTINGS, image_environment, is_pinned
from tests.stack import ROOT

_LINES: Final = re.sub(r"\s*\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
STEPS: Final = [line.partition(" ")[::2] for line in _LINES if line and not line.startswith("#")]
_LAST_STAGE: Final = max(number for number, (word, _) in enumerate(STEPS) if word == "FROM")
RUNNING: Final = STEPS[_LAST_STAGE:]


def of(word: str, steps: list[tuple[str, str]] = STEPS) -> list[str]:
    """What every such instruction says."""
    return [rest for name, rest in steps if name == word]


def test_every_base_is_a_release_and_both_are_the_same() -> None:
    bases = [base.partition(" ")[0] for base in of("FROM")]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "the interpreter of the environment is the one that runs it"
    assert all(map(is_pinned, bases))


def test_it_runs_as_a_number_that_is_not_root_and_hears_signals() -> None:
    assert [user for user in of("USER", RUNNING) if not re.fullmatch(r"[1-9][0-9]{3,}:[1-9][0-9]{3,}", user)] == []
    assert [word for word, _ in RUNNING].index("USER") < [word for word, _ in RUNNING].index("CMD")
    assert of("STOPSIGNAL", RUNNING) == ["SIGTERM"]
    (command,) = of("CMD", RUNNING)
    assert re.fullmatch(r'\["([a-z-]+)".*\]', command), "no shell between us and the signals"
    assert re.findall(r'"([a-z-]+)"', command)[0] in SCRIPTS
    assert not of("RUN", RUNNING), "nothing is installed in what runs"
    assert not of("ADD")


def test_its_environment_is_production_and_names_settings_alone() -> None:
    variables = image_environment()
    ours = {name: value for name, value in variables.items() if name.startswith("PAYOUTS_") or name in SETTINGS}

    assert ours["PAYOUTS_ENV"] == PRODUCTION
    assert {"PORT": str(GATEWAY_PORT), "PAYOUTS_ADMIN_PORT": str(ADMIN_PORT)}.items() <= ours.items()
    assert of("EXPOSE", RUNNING) == [f"{GATEWAY_PORT} {ADMIN_PORT}"]
    assert ours.keys() <= SETTINGS.keys()
    for name, value in ours.items():
        SETTINGS[name].parse(value)
    assert not [name for name in variables if re.search("PASSWORD|KEY|SECRET|TOKEN", name)]


def test_what_it_copies_is_there_is_all_that_the_wheel_needs_and_is_let_through() -> None:
    copied = {source.rstrip("/") for rest in of("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert packages | files | {"requirements.lock", "requirements-otel.lock", "deploy/build.lock"} == copied

    ignored = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert ignored[0] == "*"
    assert {line[1:].rstrip("/") for line in ignored if line.startswith("!")} == copied
    for unwanted in (".local/keys.json", ".git/config", "deploy/.env", ".venv/pyvenv.cfg"):
        assert not any(fnmatch(unwanted, line[1:].rstrip("/") + "*") for line in ignored if line.startswith("!"))


def pins(name: str) -> dict[str, set[str]]:
    """What a lock names, and the hashes of each."""
    return {
        found[1]: set(re.findall("sha256:[0-9a-f]{64}", found[2]))
        for found in re.finditer(
            r"^([a-z0-9.-]+==\S+).*\\\n((?:    --hash=.*\n?)+)", (ROOT / name).read_text(), re.MULTILINE
        )
    }


def test_what_traces_need_is_beside_all_that_is_always_there() -> None:
    plain, tracing, dev = pins("requirements.lock"), pins("requirements-otel.lock"), pins("requirements-dev.lock")
    for fewer, more in ((plain, tracing), (tracing, dev)):
        assert fewer == {pin: more.get(pin) for pin in fewer}, "what is tried is what runs"
    assert {pin.partition("==")[0] for pin in tracing.keys() - plain.keys()} >= {
        "opentelemetry-sdk",
        "opentelemetry-api",
    }
    assert of("ARG") == ["LOCK=requirements.lock"]


def test_what_builds_it_is_locked_like_everything_else() -> None:
    build, dev = pins("deploy/build.lock"), pins("requirements-dev.lock")
    assert "hatchling" in {pin.partition("==")[0] for pin in build}
    assert {pin: hashes for pin, hashes in dev.items() if pin in build} == build
    assert [
        step for step in of("RUN") if "pip install" in step and "--requirement" not in step and "--no-index" not in step
    ] == []
