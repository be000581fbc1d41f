# Every target prepares what it needs: a virtual environment in .venv, with the versions that constraints.txt pins.
# A stamp file remembers what was installed, so that a second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASYNCPG_BEFORE := 0.30.0 0.31.0
SQLALCHEMY_BEFORE := 2.0.58

DEMO_ARGS ?=
PYTEST_ARGS ?=
CHAOS_SECONDS ?= 120
CHAOS_SEED ?= 1
# The tests wait more than they compute. Those of a file stay in one process, with servers of its own.
TEST_PROCESSES ?= 2
SOAK_SECONDS ?= 1800
SOAK_SEED ?= 1

# Before 0.32 the driver itself complains to the event loop of a connect that is cancelled while it waits for TLS.
COMPLAINT := tests/integration/test_cancellation.py::test_a_connect_that_is_cancelled_leaves_no_exception_that_was_never_retrieved

# A test that hangs shows where, and ends the run.
NO_HANGING := -o faulthandler_timeout=180 -o faulthandler_exit_on_timeout=true

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1
export PIP_DEFAULT_TIMEOUT ?= 60

# An environment whose Python is gone (upgraded, say) is of no use, and its stamps would lie.
$(shell test -x $(BIN)/python || rm -rf $(VENV))

PIP_INSTALL := $(BIN)/python -m pip install --quiet
DEVELOP := $(VENV)/.develop
# The demo is content with the tools of development where these are installed already.
DEMO := $(if $(wildcard $(DEVELOP)),$(DEVELOP),$(VENV)/.demo)

SITE := $(VENV)/.site
PEERS := $(VENV)/.peers

.PHONY: help demo test pythons sqlalchemy chaos soak peers check audit bench profile format tables charts docs dist clean

help:
	@echo "make demo   asyncpg.Pool and ResilientPool with databases that pause when idle, and under the same faults"
	@echo "            (DEMO_ARGS='--resume-seconds 15' for the time a real one takes to wake)"
	@echo "make test   all tests, on the installed wheel and on every supported asyncpg"
	@echo "make pythons the unit and transaction tests on every Python from 3.11 on that this machine has"
	@echo "make sqlalchemy  the tests with SQLAlchemy on SQLAlchemy 2.0"
	@echo "make chaos  reads, writes and transactions under faults, for two minutes (CHAOS_SECONDS=120, CHAOS_SEED=1)"
	@echo "make soak   the same and more for half an hour, and what the process holds (SOAK_SECONDS=1800, SOAK_SEED=1)"
	@echo "make peers  asyncpg's own tests of its pool, and those of databases and PgQueuer, against this one"
	@echo "make check  formatting, lint, types, import contracts"
	@echo "make audit  whether a pinned version has a known vulnerability; asks a service on the network"
	@echo "make bench  what a call costs and what a recovery takes, beside other pools"
	@echo "make profile where the time of a call goes, by function"
	@echo "make docs   the documentation, into build/site; every link is checked"
	@echo "make dist   sdist and wheel, into dist/; both are installed into an empty environment"
	@echo "make format / make tables / make charts / make clean"

demo: $(DEMO)
	PYTHONPATH=examples $(BIN)/python -m demo $(DEMO_ARGS)

# The tests import the wheel that users would install, not the sources: `pytest`, unlike `python -m pytest`, leaves the
# current directory out of the path. While you edit, `.venv/bin/python -m pytest tests/unit` tests the sources instead.
test: $(VENV)/.wheel $(ASYNCPG_BEFORE:%=$(VENV)/asyncpg-%)
	@for version in $(ASYNCPG_BEFORE); do \
		echo "the tests of verdicts and cancellation on asyncpg $$version"; \
		PYTHONPATH=$(VENV)/asyncpg-$$version $(BIN)/python -P -c \
			"import asyncpg; assert asyncpg.__version__ == '$$version', asyncpg.__file__" && \
		PYTHONPATH=$(VENV)/asyncpg-$$version $(BIN)/pytest --quiet $(NO_HANGING) \
			tests/unit/retry tests/integration/test_classifier_on_a_real_server.py \
			tests/integration/test_scripted_server.py tests/integration/test_services.py \
			tests/integration/test_cancellation.py --deselect $(COMPLAINT) || exit 1; \
	done
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(NO_HANGING)

pythons: $(DEVELOP)
	$(BIN)/nox $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

chaos: $(VENV)/.wheel
	RESILIENT_POOL_CHAOS_SECONDS=$(CHAOS_SECONDS) RESILIENT_POOL_CHAOS_SEED=$(CHAOS_SEED) \
		$(BIN)/pytest --capture=no $(NO_HANGING) -o faulthandler_timeout=$$(($(CHAOS_SECONDS) + 180)) tests/chaos/test_chaos.py
	RESILIENT_POOL_LOAD_SECONDS=$$(($(CHAOS_SECONDS) / 2)) $(BIN)/pytest $(NO_HANGING) -o faulthandler_timeout=600 \
		tests/integration/test_load.py

soak: $(VENV)/.wheel
	RESILIENT_POOL_SOAK_SECONDS=$(SOAK_SECONDS) RESILIENT_POOL_SOAK_SEED=$(SOAK_SEED) \
		RESILIENT_POOL_SOAK_REPORT=benchmarks/results/soak.md \
		$(BIN)/pytest --capture=no -o faulthandler_timeout=0 tests/chaos/test_soak.py

# asyncpg's own tests of its pool, and those of databases and PgQueuer, against ours. Nothing of them is kept here.
peers: $(VENV)/.wheel $(VENV)/peers/asyncpg $(VENV)/peers/databases $(VENV)/peers/pgqueuer
	$(BIN)/python -P tests/peers/run_asyncpg_pool.py $(VENV)/peers/asyncpg
	$(BIN)/python -P tests/peers/run_databases.py $(VENV)/peers/databases
	$(BIN)/python -P tests/peers/run_pgqueuer.py $(VENV)/peers/pgqueuer

# The tests of a source distribution, without its sources. To read its metadata pip prepares a build, with pinned tools as well:
# one pip heeds the first of the two variables there, a newer one the second.
$(VENV)/peers/%: constraints.txt | $(PEERS)
	@rm -rf $@ $@.partial && mkdir -p $@ $@.partial
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip download --quiet --no-deps --no-binary $* --dest $@.partial $*
	@tar -xzf $@.partial/$*-*.tar.gz -C $@.partial
	@mv $@.partial/$*-*/test* $@/ && rm -rf $@.partial

check: $(DEVELOP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy resilient_pool tests/typing
	$(BIN)/lint-imports

# Not part of the gate: an advisory of tomorrow, or a network without that service, says nothing about a change. With --strict what
# could not be looked up is an error, and not taken for sound.
audit: $(DEVELOP)
	@$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation '.[audit]'
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

profile: $(VENV)/.wheel
	$(BIN)/python benchmarks/profile_call.py

bench: $(VENV)/.wheel
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/transactions.py
	$(MAKE) charts

format: $(DEVELOP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: $(VENV)/.wheel
	$(BIN)/python scripts/update_docs.py
	$(BIN)/python scripts/draw_architecture.py

charts: $(SITE)
	$(BIN)/python scripts/draw_charts.py

docs: $(SITE)
	$(BIN)/zensical build --strict --clean

# What is uploaded to an index, checked as its users get it.
dist: $(SITE)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python scripts/check_dist.py dist

clean:
	rm -rf $(VENV) build dist .cache .nox .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed')"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Without build isolation, so that the build's own tools are pinned as well.
$(VENV)/.demo $(DEVELOP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV)"
	@$(PIP_INSTALL) --constraint constraints.txt hatchling
	@$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation '.[$(if $(filter %.demo,$@),demo,dev)]'
	@touch $@

$(SITE): EXTRAS := docs,release
$(PEERS): EXTRAS := peers
$(SITE) $(PEERS): $(DEVELOP)
	@$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.wheel: $(DEVELOP) README.md LICENSE $(shell find resilient_pool -type f -not -name '*.pyc')
	@$(PIP_INSTALL) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

sqlalchemy: $(VENV)/.wheel $(VENV)/sqlalchemy-$(SQLALCHEMY_BEFORE)
	PYTHONPATH=$(VENV)/sqlalchemy-$(SQLALCHEMY_BEFORE) $(BIN)/python -P -c \
		"import sqlalchemy; assert sqlalchemy.__version__ == '$(SQLALCHEMY_BEFORE)', sqlalchemy.__file__"
	PYTHONPATH=$(VENV)/sqlalchemy-$(SQLALCHEMY_BEFORE) $(BIN)/pytest --quiet $(NO_HANGING) \
		$(wildcard tests/integration/contrib/test_sqlalchemy_*.py)

$(VENV)/sqlalchemy-%: | $(BIN)/python
	@rm -rf $@ $@.partial
	@$(PIP_INSTALL) --no-deps --target $@.partial sqlalchemy==$*
	@mv $@.partial $@

$(VENV)/asyncpg-%: | $(BIN)/python
	@rm -rf $@ $@.partial
	@$(PIP_INSTALL) --no-deps --target $@.partial asyncpg==$*
	@mv $@.partial $@
