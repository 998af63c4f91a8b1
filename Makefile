# Every target does its own set-up on a fresh machine: virtual environment, exact dependencies, and, as root with apt, the
# Debian packages that tests use as foreign peers. Nothing else is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Most of a test in network namespaces is waiting, for probes, deadlines and back-off: more of them than there are CPUs run side by side, each
# file by one worker because the tests of a file share a lab. In the order written here, so that no long file is left for the end.
IN_PARALLEL   := -n 4 --dist loadfile --no-loadscope-reorder
SLOWEST_FIRST := tests/netns tests/interop tests/property tests/wire tests/unit

# The same tree with its data path compiled (setup.py): beside the sources, which it would otherwise hide from whoever edits them.
COMPILED    := build/compiled
OF_COMPILED := tests/netns/test_agent.py tests/netns/test_lab_mesh.py tests/netns/test_waypoint_traffic.py tests/netns/test_hostile.py \
    tests/netns/test_waypoint_hostile.py tests/netns/mesh tests/netns/ztunnel_py tests/interop/test_envoy_hbone.py tests/property tests/wire \
    tests/unit/deploy tests/unit/mesh tests/unit/waypoint_py tests/unit/ztunnel_py
IN_COMPILED := cd $(COMPILED) && PYTHONPATH="$$PWD" $(abspath $(BIN))/python

# The image has AWS-LC under TLS; where there is a Rust toolchain, what is compiled has it too, else, or with TLS=openssl, the package index's OpenSSL.
AWS_LC := build/aws-lc
TLS    ?= $(if $(shell command -v cargo 2>/dev/null),aws-lc,openssl)

# Two clusters side by side, each worker's its own; with CLUSTER=dev the one that `make cluster` keeps up, and one after the other.
ON_CLUSTERS := $(if $(CLUSTER),,-n 2 --dist loadfile --no-loadscope-reorder)

.PHONY: help test aws-lc compiled test-compiled demo lint bench proto crds constraints clean system cluster cluster-down test-cluster
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@echo "==> virtual environment and dependencies (once; about half a minute)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

system:
	@sh tests/install-system-packages.sh

test: $(STAMP) system  ## everything but the real cluster: unit, property, wire, network namespaces, foreign peers
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(SLOWEST_FIRST)

aws-lc: system  ## the package cryptography with AWS-LC inside, in build/aws-lc (once; three minutes); needs Rust
	@PYTHON=$(PYTHON) sh deploy/images/aws-lc/build.sh $(AWS_LC)

compiled: $(STAMP) system $(filter aws-lc,$(TLS))  ## the tree as it ships, in build/compiled (two minutes); needs a C compiler, and Rust for AWS-LC
	@$(if $(filter-out 1,$(words $(filter aws-lc openssl,$(TLS)))),echo "TLS is aws-lc or openssl; it was '$(TLS)'" >&2; exit 1)
	@mkdir -p $(COMPILED)/build
	@find $(COMPILED) -mindepth 1 -maxdepth 1 ! -name build ! -name .pytest_cache -exec rm -rf {} +
	@git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C $(COMPILED)
	@echo "==> compiling the data path"
	@cd $(COMPILED) && AMBIENT_MESH_COMPILED=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace -j 2 >build/log 2>&1 \
		|| { cat build/log; echo "==> the data path could not be compiled"; exit 1; }
	@$(if $(filter aws-lc,$(TLS)),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(COMPILED) $(AWS_LC)/wheel/*.whl,\
		echo "==> with the package index's OpenSSL, not AWS-LC (no cargo here, or TLS=openssl)")

test-compiled: compiled  ## the tests of what is compiled, on the compiled code
	@$(IN_COMPILED) -m pytest $(IN_PARALLEL) $(AGAIN) $(OF_COMPILED)

test-cluster: $(STAMP) system  ## a real Kubernetes, built once (ten minutes), as two clusters of two nodes; needs root and Go
	@$(BIN)/python -m tests.cluster.harness check
	@$(BIN)/python -m tests.cluster.harness prepare
	@$(BIN)/python -m pytest $(ON_CLUSTERS) tests/cluster

cluster: $(STAMP) system  ## bring such a cluster up and keep it; prints the kubeconfig
	@$(BIN)/python -m tests.cluster.harness up

cluster-down:  ## end it
	@$(BIN)/python -m tests.cluster.harness down

demo: $(STAMP)  ## two nodes on this machine: watch a label make mutual TLS of plaintext, and a waypoint route and guard requests
	@$(BIN)/python -m meshctl_py.lab.demo

lint: $(STAMP)  ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# What users run is compiled, so that is what is measured; INTERPRETED=1 measures the same without.
bench: $(STAMP) $(if $(INTERPRETED),system,compiled)  ## what the data path and its state cost, beside Envoy; ONLY=figure measures one
ifdef INTERPRETED
	@$(BIN)/python -m benches $(ONLY)
else
	@$(IN_COMPILED) -m benches $(ONLY); status=$$?; mv -f bench.json bench-machine.json $(CURDIR) 2>/dev/null; exit $$status
endif

proto: $(STAMP)  ## regenerate mesh/xds/proto from its .proto sources
	@$(BIN)/python -m mesh.xds.proto.generate

crds: $(STAMP)  ## regenerate deploy/crds from the parsers in mesh/kube
	@$(BIN)/python -m mesh.kube.crds deploy/crds

constraints: $(STAMP)  ## pin what is installed now
	@{ echo '# Exact versions of everything that is installed, so that two installations a year apart are the same. Made by `make constraints`.'; \
	   $(BIN)/pip freeze --exclude-editable; } > constraints.txt

clean:  ## remove the virtual environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
