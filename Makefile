# Everything that is built goes under ~/.cache/lockstep, never into the clone.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/lockstep/target
.DEFAULT_GOAL := help
.PHONY: help fmt crds check test sim explore fuzz mutants cargo-mutants native csi cluster image cluster-up e2e cluster-down demo bench soak deny
WRITES ?= 2
SEEDS ?= 10000
FUZZ_SECONDS ?= 600
FIRST ?= 0

help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

fmt: ## Format the code
	cargo fmt --all

crds: ## The chart's CustomResourceDefinitions, from the Rust types
	cargo run --quiet --locked -p lockstep-proto --bin crds -- charts/lockstep/templates/crds

check: ## Formatting, lints, unit and simulator tests: minutes, no root (needs Go, for the CSI specification)
	tests/run check unit

test: ## Every tier, as CI runs it, and a table of them
	tests/run

sim: ## Random histories of the mirror in the simulator: what they reach, and that no oracle breaks (SEEDS=N FIRST=N)
	cargo run --quiet --release --locked -p lockstep-sim --bin sim -- --seeds $(SEEDS) --first $(FIRST)

explore: ## Every interleaving of a few writes, a flush, a fault and a crash on a tiny volume (WRITES=1 to 3; 3: a quarter of an hour)
	cargo run --quiet --release --locked -p lockstep-sim --bin explore -- --writes $(WRITES)

fuzz: ## The decoders on what a fuzzer thinks of, each for FUZZ_SECONDS=N
	FUZZ_SECONDS=$(FUZZ_SECONDS) tests/run fuzz

mutants: ## Break the mirror on purpose, patch by patch: a named test fails, the simulator's oracles alone notice, the exploration finds it
	MUTANTS= tests/run mutants

cargo-mutants: ## Break range lock, bitmap, superblock and membership in every way that cargo-mutants knows (FILES=... for others)
	tests/mutants/generated $(FILES)

native: ## The datapath on loop disks with XFS, under fio (needs root)
	tests/run native

csi: ## The images' programs on loop disks: tests of calls, failures, bad input, and csi-sanity (needs root)
	tests/run csi

cluster: ## The same on a real Kubernetes API, which is built from its Go modules first (needs root and Go)
	tests/run cluster

image: ## The images of the Dockerfile, by buildah from local bases, as OCI archives (needs root)
	tests/e2e/image release

cluster-up: ## A Kubernetes cluster of one node with two blank disks, in namespaces of its own: tests/e2e/enter kubectl get nodes (needs root and Go)
	tests/e2e/up

e2e: ## The chart on such a cluster, as its users see it: claims, pods, failing disks, updates (WORDS="grows": some steps, and the cluster stays)
	tests/e2e/run $(WORDS)

cluster-down: ## End that cluster
	tests/e2e/down

demo: ## The whole of it on this machine, in two minutes: provision, load, a failed disk, a rebuild, a kill (needs root)
	tests/csi/demo

bench: ## Lockstep against qemu's mirror and a plain loop device, on disks in memory (TMPDIR=... for others; BENCH="5 1 NAME": rounds, seconds, some; needs root)
	tests/packages qemu-storage-daemon:qemu-system-common fio:fio mkfs.xfs:xfsprogs losetup:mount setpriv:util-linux cc:build-essential
	cargo build --quiet --release --locked -p lockstep-native -p lockstep-fuse-holder
	TMPDIR=$${TMPDIR:-/dev/shm} $(CARGO_TARGET_DIR)/release/bench $(BENCH)

soak: ## The long figures, and a table of them (PARTS="shell=5 hung": some, for other minutes; needs root)
	tests/soak $(PARTS)

deny: ## Licenses, sources and bans of the dependencies
	tests/run deny
