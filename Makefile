# What people do here. PORT, DATABASE_URL and every other setting of the README pass through: make run PORT=9000

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help run demo test torment drill bench alarms plants check lint types fmt reset venv

help: ## Show this.
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16

run: venv ## Bring up the whole product on this machine, until Ctrl-C.
	@$(PYTHON) -m ops.local up

demo: venv ## Send 1,000 payouts through what `make run` brought up.
	@$(PYTHON) -m ops.demo

test: venv ## Run the tests; ARGS="-k word" chooses some.
	@$(PYTHON) -m pytest $(ARGS)

torment: venv ## A bank in its worst mood, then a storm: kill -9 every 5 s for ten minutes; ARGS="--storm-seconds 60".
	@$(PYTHON) -m ops.torment $(ARGS)

drill: venv ## Lose the database under load, restore it to an earlier moment, compare both ledgers; ARGS="--payouts 300".
	@$(PYTHON) -m ops.drill $(ARGS)

bench: venv ## Measure the product beside what is possible here; ARGS="accept", "latency settle", …; ARGS=--help.
	@sh ops/bootstrap.sh bench
	@$(PYTHON) -m bench $(ARGS)

alarms: venv ## Provoke every alarm by its page of deploy/runbook, and see it fire and end; ARGS="RailSilent" chooses.
	@$(PYTHON) -m tests.runbook $(ARGS)

plants: venv ## Plant the faults that would cost money, one by one; each must turn a test red.
	@$(PYTHON) -m tests.plants $(ARGS)

check: lint types test ## Lint, types and tests; those of deploy/ need no engine and no cluster.

lint: venv ## Look for mistakes and for untidy formatting.
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: venv ## Check the types.
	@$(PYTHON) -m mypy

fmt: venv ## Format the code.
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

reset: venv ## Forget everything that `make run` keeps in .local.
	@$(PYTHON) -m ops.local reset

venv: # Make .venv, or bring it to what the lock says.
	@sh ops/bootstrap.sh
