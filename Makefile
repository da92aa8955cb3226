# One truth for people and CI. `make help` lists what there is.

SHELL := /bin/bash
GO    ?= go
# Tests and the demo need root (mounts, network namespaces); an ordinary user's
# run goes through sudo, with the user's own Go on the path.
SUDO  := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E env PATH="$$PATH")
# BENCH=name runs one benchmark, SOAK=seconds says how long a soak lasts.
BENCH ?=
SOAK  ?= 600

# Everything but the race detector goes without cgo, as what we ship does: then
# the compiler's cache is shared by build and tests.
export GO
export CGO_ENABLED = 0

.PHONY: help setup world build cross demo test unit race integration fuzz bench soak lint fmt clean

help:
	@echo 'make demo            set up everything, run the main job, show what happened (KEEP=1 leaves it running)'
	@echo 'make test            set up everything, run every test, print what took how long'
	@echo 'make lint            golangci-lint, built once per machine'
	@echo 'make build           bin/floxd and bin/floxctl'
	@echo 'make cross           the same for every system we ship'
	@echo 'make bench [BENCH=name]   measure against peers, into bench/out/'
	@echo 'make soak [SOAK=600]      the fault tests over and over, so many seconds'
	@echo 'make unit race integration fuzz world setup fmt clean   parts of the above'

setup:
	@scripts/setup

# The demo world: Debian packages as Nix store paths, built once per machine.
world: setup
	@$(GO) build -o bin/mkworld ./integration/world/mkworld
	@$(SUDO) bin/mkworld

build:
	$(GO) build -o bin/ ./cmd/floxd ./cmd/floxctl

cross:
	GOOS=linux  GOARCH=amd64 $(GO) build -o bin/linux-amd64/  ./cmd/floxd ./cmd/floxctl
	GOOS=linux  GOARCH=arm64 $(GO) build -o bin/linux-arm64/  ./cmd/floxd ./cmd/floxctl
	GOOS=darwin GOARCH=arm64 $(GO) build -o bin/darwin-arm64/ ./cmd/floxctl

demo: setup world build
	@$(GO) build -o bin/demo ./integration/demo
	@$(SUDO) env KEEP="$(KEEP)" bin/demo

test:
	@scripts/test setup world build cross unit race integration

unit race integration fuzz:
	@scripts/test $@

bench: setup world build
	@$(GO) build -o bin/bench ./bench
	@$(SUDO) bin/bench $(BENCH)

soak: setup world build
	@FLOX_SOAK=$(SOAK) scripts/test race-all soak

lint:
	@scripts/lint

fmt:
	@scripts/lint fmt

clean:
	rm -rf bin bench/out
