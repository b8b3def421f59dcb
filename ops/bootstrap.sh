#!/bin/sh
# Makes .venv with exactly what requirements-dev.lock names, and this project in it; `bootstrap.sh bench` adds what
# requirements-bench.lock names. Does nothing when that is so already.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

fingerprint() { { pwd && cat requirements-dev.lock pyproject.toml; } | cksum; }

is_current() { [ "$(cat .venv/fingerprint 2>/dev/null)" = "$(fingerprint)" ] && works .venv/bin/python; }

# Whether a command is a Python of ours: some are names without a program behind them.
works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  for name in python3.13 python3.12 python3.11 python3; do
    if works "$name"; then
      command -v "$name"
      return
    fi
  done
}

install_by_uv() {
  # Trust whom this machine trusts: behind a company's proxy uv's own list is not enough.
  export UV_SYSTEM_CERTS=1
  works .venv/bin/python || uv venv --quiet --clear --python "${python:-3.12}" .venv
  uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements-dev.lock
  uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
}

install_by_pip() {
  [ -n "$python" ] || fail "no Python 3.11 or newer; install one, or uv, which brings its own"
  works .venv/bin/python || "$python" -m venv --clear --without-pip .venv ||
    fail "$python has no module venv; install it (on Debian: $(debian_package))"
  find_pip || install_debian_package || fail "$python has no pip; install $(debian_package) (Debian), or uv, and come again"
  pip install --require-hashes -r requirements-dev.lock
  pip install --no-deps --no-build-isolation -e .
}

# Debian ships Python without what puts pip into a new environment; a pip beside that Python does as well.
find_pip() {
  if .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1; then
    pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
  elif "$python" -m pip --python .venv/bin/python --version >/dev/null 2>&1; then
    pip() { "$python" -m pip --python .venv/bin/python --quiet --disable-pip-version-check "$@"; }
  else
    return 1
  fi
}

debian_package() { "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'; }

install_debian_package() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "installing $(debian_package) by apt-get, since $python cannot make an environment with pip"
  apt-get update -qq && apt-get install -qq -y --no-install-recommends "$(debian_package)" >&2 && find_pip
}

# What baselines of `make bench` need, beside the rest.
has_extras() { [ "$extras" != bench ] || cmp -s requirements-bench.lock .venv/bench.lock; }

install_extras() {
  say "installing what requirements-bench.lock names into .venv, once"
  if command -v uv >/dev/null; then
    UV_SYSTEM_CERTS=1 uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements-bench.lock
  else
    python=$(find_python) && find_pip && pip install --require-hashes -r requirements-bench.lock
  fi && cp requirements-bench.lock .venv/bench.lock
}

extras=${1:-}
if is_current && has_extras; then
  exit
fi
# Two that come at the same time must not install over each other.
mkdir -p .local
exec 9>.local/bootstrap.lock
if command -v flock >/dev/null; then
  flock 9
fi
if ! is_current; then
  say "installing what requirements-dev.lock names into .venv; this takes a minute, once"
  python=$(find_python)
  if command -v uv >/dev/null; then
    install_by_uv
  else
    install_by_pip
  fi
  fingerprint >.venv/fingerprint
fi
has_extras || install_extras || say "that failed; \`make bench\` goes on without the plain implementation"
