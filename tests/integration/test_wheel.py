"""The product as it is deployed: its wheel and what `requirements.lock` names, in an environment that has nothing else.

The steps are those of `deploy/Dockerfile`, without an engine that runs containers.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest

from migrations.run import newest_revision
from ops.ports import choose_port
from tests.conftest import Server
from tests.factories import environment
from tests.flows import cloned
from tests.stack import DEADLINE_SECONDS, ROOT, eventually, http_status

PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRED: Final = ("DATABASE_URL", "PAYOUTS_CONTENT_KEY", "PAYOUTS_MASTER_KEYS")


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the product in it. Commands run far from the checkout, as an image would run them."""

    wheel: Path
    folder: Path

    def command(self, name: str) -> Path:
        """A console script."""
        return self.folder / "bin" / name

    def run(self, *arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a console script to its end, with these variables and no others."""
        name, *rest = arguments
        return subprocess.run(
            [self.command(name), *rest],
            cwd=self.folder.parent,
            env=dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel, and install it beside exactly what the lock names."""
    folder = tmp_path_factory.mktemp("installed")
    environment_folder = folder / "environment"
    succeed(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (wheel,) = folder.glob("*.whl")
    succeed(sys.executable, "-m", "venv", "--without-pip", str(environment_folder))
    install = installer(environment_folder / "bin" / "python")
    succeed(*install, "--require-hashes", "--only-binary", ":all:", "--requirement", str(ROOT / "requirements.lock"))
    succeed(*install, "--no-deps", "--no-index", str(wheel))
    return Installed(wheel, environment_folder)


def installer(python: Path) -> list[str]:
    """A command that installs into another environment, by what `ops/bootstrap.sh` would use."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    uv = shutil.which("uv")
    assert uv is not None, "an environment without pip was made by uv"
    return [uv, "pip", "install", "--quiet", "--python", str(python)]


def succeed(*command: str) -> None:
    """Run it in the checkout; fail with what it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_product_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    packages = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])

    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == packages
    assert "migrations/script.py.mako" in names
    assert {Path(name).name for name in names if name.startswith("migrations/versions/")} == {
        path.name for path in (ROOT / "migrations" / "versions").glob("*.py")
    }


def test_the_lock_names_all_that_the_product_imports(installed: Installed) -> None:
    """Each module, in an environment without the tests' packages, extras and a PostgreSQL from a wheel; of traces only what
    needs no extra.
    """
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in ("__init__", "env", "opentelemetry") and "versions" not in path.parts
    ]
    program = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    done = subprocess.run(
        [installed.command("python"), "-I", "-W", "error", "-c", program], capture_output=True, text=True, env={}
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_every_entry_point_says_what_it_needs(installed: Installed) -> None:
    assert set(PROJECT["project"]["scripts"]) == {"payouts", "payouts-gateway", "payouts-worker"}

    shown = installed.run("payouts", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "migrate" in shown.stdout

    for arguments in (("payouts-gateway",), ("payouts-worker", "settle")):
        refused = installed.run(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.partition(": ")[2].strip() == "; ".join(f"{name}: must be set" for name in REQUIRED)

    usage = installed.run("payouts-worker", "nothing")
    assert (usage.returncode, usage.stdout) == (2, "")
    assert usage.stderr.startswith("usage: ")

    homeless = installed.run("payouts", "migrate")
    assert (homeless.returncode, homeless.stdout) == (2, "")
    assert "DATABASE_URL is not set" in homeless.stderr


async def test_it_migrates_a_database_and_serves_on_it(server: Server, installed: Installed) -> None:
    async with cloned(server, "template0") as url:
        variables = environment(url)
        migrated = await asyncio.to_thread(installed.run, "payouts", "migrate", "--json", variables=variables)
        assert (migrated.returncode, migrated.stderr) == (0, "")
        assert json.loads(migrated.stdout) == {"revision": newest_revision()}

        for arguments in (("payouts-gateway",), ("payouts-worker", "all")):
            admin_port = choose_port()
            process = await asyncio.create_subprocess_exec(
                installed.command(arguments[0]),
                *arguments[1:],
                cwd=installed.folder,
                env={**variables, "PORT": str(choose_port()), "PAYOUTS_ADMIN_PORT": str(admin_port)},
                stdout=asyncio.subprocess.DEVNULL,
            )
            try:

                async def ready(port: int = admin_port) -> bool:
                    return await http_status(f"http://127.0.0.1:{port}/readyz") == 200

                await eventually(ready, f"{arguments[0]} is ready")
                process.terminate()
                assert await asyncio.wait_for(process.wait(), DEADLINE_SECONDS) == 0
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
