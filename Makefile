# make run     ChatRail on this machine, at http://127.0.0.1:8000
# make run-cluster   the same with a broker of three nodes, any of which may die
# make test    all tests
# make check   style, types and boundaries
# make bench   what ChatRail adds to a call of Claude; make bench-quota how fast quota authorizes;
#              make bench-ingest how fast events get from the stream into both databases; make bench-audit how fast
#              the record is audited, exported and replayed, in what memory, and how long a page of it takes
# make faults  everything that can die does, under load, and a checker counts; SEED=7 MINUTES=5;
#              make mutations puts back classic mistakes, each of which it must find
# make quarantine   what ledger and quota could not handle; ARGS=--redrive counts what can be read after a fix
# make audit   whether stream, ledger and totals agree, and what does not; USER= FROM= TO= to choose, ARGS=--json
# make explain   the story of one generation, from the record: ID=, and USER= for nobody else's; ARGS=--json
# make replay  ledger and totals anew from the stream, while the services run; ARGS=--dry-run shows what would change,
#              UNTIL=time rebuilds the past (OUT=folder keeps it), WEIGHTS=plans.toml what usage would come to under it
# make export  every record, to read elsewhere: FORMAT=csv|ndjson|parquet OUT=file, and USER= FROM= TO= to choose
# make archive   what the stream had before a moment, as verified Parquet: BEFORE=2026-10-01, OUT=folder; then
#              make trim takes off the stream what is archived, but for its last day
# make prove   a user's own records with what proves that they are in the ledger as they were sealed: USER= OUT=file
# make lock    requirements*.lock from pyproject.toml; make lock ARGS=--upgrade takes newer versions
# make clean   everything that make made, except data/

PYTHON ?= python3
bin := .venv/bin

.PHONY: run run-cluster test check bench bench-quota bench-ingest bench-audit faults mutations quarantine audit explain replay export archive trim prove lock clean

# exec: a signal for make reaches the program itself, with no shell in between.
run: .venv/installed-run
	@exec $(bin)/python -m deploy.local

run-cluster: .venv/installed-run
	@CHATRAIL_NATS_CLUSTER=true exec $(bin)/python -m deploy.local

# Several processes, and a file's tests in one of them: they share what is slow to start. How many, and in which
# order, says tests/conftest.py. What one has compiled is compiled, whatever the shell says.
test: export PYTHONDONTWRITEBYTECODE =
# In memory, where there is much of it: nothing of it outlives the run.
test: .venv/installed-dev
	@room_kib=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $$4 }'); \
	[ "$${room_kib:-0}" -lt 6000000 ] || export TMPDIR="$${TMPDIR:-/dev/shm}"; \
	exec $(bin)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

bench: .venv/installed-dev
	@exec $(bin)/python -m tests.bench $(ARGS)

bench-quota: .venv/installed-dev
	@exec $(bin)/python -m tests.bench.quota $(ARGS)

bench-ingest: .venv/installed-dev
	@exec $(bin)/python -m tests.bench.ingest $(ARGS)

bench-audit: .venv/installed-dev
	@$(bin)/python -m tests.bench.audit $(ARGS)
	@$(bin)/python -m tests.bench.pages $(ARGS)
	@$(bin)/python -m tests.bench.export $(ARGS)
	@exec $(bin)/python -m tests.bench.replay $(ARGS)

faults: .venv/installed-dev
	@exec $(bin)/python -m tests.faults.machine $(call told,SEED,seed) $(call told,MINUTES,minutes) $(ARGS)

mutations: .venv/installed-dev
	@exec $(bin)/python -m pytest -v tests/faults/test_mutations.py $(ARGS)

quarantine: .venv/installed-run
	@$(bin)/python -m services.ledger quarantine $(ARGS)
	@$(bin)/python -m services.quota quarantine $(ARGS)

# Only what make itself is told: every shell has a USER. As it was typed, whatever is in it; of an empty one the
# command says that it is empty.
told = $(if $(filter command,$(origin $(1))),--$(2)='$(subst ','\'',$(value $(1)))')

# Ends with an error where something differs: 1 from the command itself, 2 from make.
audit: .venv/installed-run
	@exec $(bin)/python -m services.ledger audit $(call told,USER,user) $(call told,FROM,from) $(call told,TO,to) $(ARGS)

explain: .venv/installed-run
	@exec $(bin)/python -m services.ledger explain $(call told,ID,id) $(call told,USER,user) $(ARGS)

replay: .venv/installed-run
	@$(if $(call told,WEIGHTS,weights),:,$(bin)/python -m services.ledger replay $(replaying))
	@exec $(bin)/python -m services.quota replay $(replaying) $(call told,WEIGHTS,weights)

replaying = $(call told,UNTIL,until) $(call told,OUT,out) $(ARGS)

prove: .venv/installed-run
	@exec $(bin)/python -m services.ledger prove $(call told,USER,user) $(call told,OUT,out) $(ARGS)

archive: .venv/installed-run
	@exec $(bin)/python -m services.ledger archive $(call told,BEFORE,before) $(call told,OUT,out) $(ARGS)

trim: .venv/installed-run
	@exec $(bin)/python -m services.ledger trim $(call told,OUT,out) $(ARGS)

export: .venv/installed-run
	@exec $(bin)/python -m services.ledger export $(call told,FORMAT,format) $(call told,OUT,out) \
	    $(call told,USER,user) $(call told,FROM,from) $(call told,TO,to)

.venv/installed-run: requirements.lock
	$(install)
	@touch $@

# Holds all of requirements.lock, in the same versions.
.venv/installed-dev: requirements-dev.lock
	$(install)
	@touch $@ .venv/installed-run

# Neither mark exists while anything is being installed, so that what broke off half-way is built anew.
# `--version` is what every Python understands, however old.
define install
	@version=$$($(PYTHON) --version 2>&1 | head -n 1); \
	case "$$version" in \
	    "Python 3."1[1-9]* | "Python 3."[2-9][0-9]* | "Python "[4-9]*) ;; \
	    "Python "*) found="$(PYTHON) is $${version#Python }" ;; \
	    *) found="$(PYTHON) cannot be found" ;; \
	esac; \
	if [ -n "$$found" ]; then \
	    echo "ChatRail needs Python 3.11 or newer; $$found. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; \
	fi; \
	if ! $(PYTHON) -c "import ensurepip, venv" 2>/dev/null; then \
	    echo "ChatRail needs Python's venv module, which $(PYTHON) lacks. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	[ -e .venv/installed-run ] || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "Installing $< into .venv; this takes a minute, once" >&2
	@rm -f .venv/installed-*
	@$(bin)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $< || { \
	    echo "The packages of $< could not be installed, for the reason above. It takes the network, or an index" \
	        "of your own in pip's settings: then make $(MAKECMDGOALS) again." >&2; exit 1; \
	}
endef

# One resolution for all, so that every file names the same version of a package. Neither indexes nor paths are written.
compile = $(bin)/uv pip compile pyproject.toml --quiet --universal --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links $(ARGS)

lock: .venv/installed-dev
	$(compile) --all-extras -o requirements-dev.lock
	$(compile) -c requirements-dev.lock --extra chat --extra ledger --extra quota --extra local -o requirements.lock
	for service in chat ledger quota; do \
	    $(compile) -c requirements-dev.lock --extra $$service -o requirements-$$service.lock || exit 1; \
	done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
