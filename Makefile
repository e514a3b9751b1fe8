# Wrenn. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
TOOL := go tool -modfile=$(CURDIR)/tools/go.mod
TEST_STATE ?= /var/tmp/wrenn-test-state
TEST_ENV := WRENN_TEST_STATE_DIR=$(TEST_STATE) WRENN_BIN=$(CURDIR)/bin
FUZZTIME ?= 5000x
CYCLES ?= 1000
SETUP := bin/wrenn setup --state-dir
# At most 3 tests that failed run once more, and the summary names them. A data race, a panic or a
# package that fails as a whole is final.
AGAIN := --rerun-fails=1 --rerun-fails-max-failures=3 --rerun-fails-run-root-test --rerun-fails-abort-on-data-race

.PHONY: help build run test test-tools test-unit test-stock test-faults soak fuzz lint ratchet generate check-generated bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: bin/sentry ## build bin/wrenn, bin/envd and bin/sentry
	go build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/wrenn ./cmd/wrenn
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o bin/envd ./cmd/envd

# gVisor, in a module of its own. A first build takes minutes of CPU, so it is made again only when its sources change.
bin/sentry: $(wildcard sentry/*.go) sentry/go.mod sentry/go.sum
	CGO_ENABLED=0 go build -C sentry -trimpath -buildvcs=false -o $(CURDIR)/bin/sentry \
	  -ldflags "-s -w -X gvisor.dev/gvisor/runsc/version.version=$$(go list -C sentry -m -f '{{.Version}}' gvisor.dev/gvisor)" .

run: build ## install what is missing, prepare this host, run the host agent
	bin/wrenn setup
	bin/wrenn serve

test: test-tools lint check-generated build ## everything that CI runs: lint, unit, race and real microVMs, as root
	$(SETUP) $(TEST_STATE)
	$(TEST_ENV) $(TOOL) gotestsum --format pkgname-and-test-fails $(AGAIN) --packages ./... -- -race -count=1 -p 1 -timeout 60m
	WRENN_TEST_LINK=packet go test -count=1 -timeout 10m -run 'Frames|Addresses|Check|Names|Limit|Isolation|Guard|Egress|Polic|Stray' ./internal/network
	$(MAKE) --no-print-directory fuzz

test-tools: # what the tests use besides what the host needs; only what is missing, for a node of another origin conflicts with apt's npm
	@for tool in curl:curl npm:npm pip3:python3-pip mkfs.erofs:erofs-utils gcc:gcc gcc:libc6-dev nft:nftables ip:iproute2 pgrep:procps; do command -v $${tool%:*} >/dev/null || missing="$${missing:-} $${tool#*:}"; done; \
	  test -z "$${missing:-}" || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; } >/dev/null

test-unit: ## tests that need nothing but Go
	go test -race ./...

test-stock: build ## the templates that E2B's clients expect, the slow build of desktop among them
	$(SETUP) $(TEST_STATE)
	$(TEST_ENV) WRENN_TEST_STOCK=1 go test -count=1 -timeout 60m -v -run 'Base|CodeInterpreter|Desktop' ./e2e

test-faults: build ## the fault matrix, the model, and the agent killed at any moment, in their long form
	$(SETUP) $(TEST_STATE)
	$(TEST_ENV) WRENN_TEST_LONG=1 go test -race -count=1 -timeout 60m -v -run 'Fault|Model|ManyAtOnce|ManyCallers|AnyMoment|Endurance' ./internal/sandbox ./e2e

soak: build ## CYCLES times create, exec, destroy: what the agent holds must not grow
	$(SETUP) $(TEST_STATE)
	$(TEST_ENV) WRENN_SOAK=$(CYCLES) go test -count=1 -timeout 24h -v -run Soak ./e2e

fuzz: ## feed the parsers nonsense, FUZZTIME each
	@grep -rlE '^func Fuzz' --include='*_test.go' internal | xargs -n1 dirname | sort -u | while read -r dir; do \
	  for f in $$(grep -hoE '^func Fuzz[A-Za-z0-9]+' $$dir/*_test.go | sed 's/func //'); do \
	    go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) ./$$dir; done; done

bench: build ## measure what a user waits for, each beside its bare floor, and what a sandbox takes
	$(SETUP) $(TEST_STATE)
	$(TEST_ENV) go test -v -p 1 -count=1 -run '^$$' -bench . -benchtime 10x -timeout 30m ./internal/network ./internal/image ./internal/agent ./e2e

lint: ## gofmt, go vet, staticcheck, buf lint, the limits of tools/ratchet, the calls of the sentry
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	$(TOOL) staticcheck ./...
	cd api && $(TOOL) buf lint
	go -C tools vet ./... && go -C tools test ./... && go -C tools run ./ratchet
	CGO_ENABLED=0 go test -C sentry -trimpath .

ratchet: ## write what has become shorter or simpler into tools/ratchet/list.txt
	go -C tools run ./ratchet -write

generate: ## generate the code of api/ anew
	cd api && $(TOOL) buf generate
	cd api/e2b && $(TOOL) oapi-codegen -config oapi-codegen.yaml -o e2b.gen.go openapi.yaml

check-generated: ## fail when the committed stubs are stale
	dir=$$(mktemp -d); trap 'rm -rf $$dir' EXIT; cp -r api $$dir/api; \
	cd api && $(TOOL) buf generate -o $$dir/new && cd .. && mkdir -p $$dir/new/e2b && \
	cd api/e2b && $(TOOL) oapi-codegen -config oapi-codegen.yaml -o $$dir/new/e2b/e2b.gen.go openapi.yaml && cd ../.. && \
	for f in $$(git ls-files 'api/*.pb.go' 'api/*.connect.go' 'api/*.gen.go'); do cmp $$f $$dir/new/$${f#api/} || { echo "stale: run make generate"; exit 1; }; done

clean: ## remove what was built
	rm -rf bin
