# What people and CI run. Each target installs what it needs on Debian 12 (as
# root) and is quick about it where nothing is missing.

CARGO := tests/lab/cargo

.DEFAULT_GOAL := help
.PHONY: help build deb demo test soak detection clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  make %-10s %s\n' "$$target" "$$text"; done

build: ## build xftrace: target/release/xftrace
	tests/lab/bootstrap
	$(CARGO) build --release --locked

deb: ## build the Debian package: target/debian/xftrace_*.deb
	tests/lab/bootstrap
	packaging/build-deb

demo: ## trace a guest from nothing: build, boot, enrol, trace, show (root)
	tests/lab/demo

# From quick to slow, so that what fails early fails soon. The guests' kernels are
# built before the tests that boot them, for their progress to be seen; the
# end-to-end tests run with the binary that users run, and what may take so long is
# measured of that too.
test: ## run all tests, the end-to-end ones with real guests too (root)
	tests/lab/bootstrap --test
	$(CARGO) test --locked --workspace
	$(CARGO) test --locked --release --test large_guest --test large_symbols
	guest-kernel-patches/check 6.1
	guest-kernel-patches/check 6.12
	packaging/test-deb
	tests/lab/initramfs "$$(tests/lab/kernel 6.1)"
	tests/lab/initramfs "$$(tests/lab/kernel 6.12)"
	tests/lab/initramfs "$$(tests/lab/kernel-variant table)"
	tests/lab/kernel-variant no-btf
	tests/lab/kernel-variant no-tracer
	$(CARGO) test --locked --release --test e2e

# Boots in all and minutes of work in all are three times these: 6.1 and 6.12 with
# the patch, and stock 6.12.
SOAK_BOOTS ?= 10
SOAK_MINUTES ?= 20

soak: ## clean guests, boot after boot, for hours: detection must find nothing (root)
	tests/lab/bootstrap --test
	XFTRACE_SOAK_BOOTS=$(SOAK_BOOTS) XFTRACE_SOAK_MINUTES=$(SOAK_MINUTES) \
		$(CARGO) test --locked --release --test e2e -- soak:: --nocapture

detection: ## try every class of hooks on guests, and write docs/detection.md's table (root)
	tests/lab/bootstrap --test
	tests/lab/initramfs "$$(tests/lab/kernel 6.1)"
	tests/lab/initramfs "$$(tests/lab/kernel 6.12)"
	tests/lab/initramfs "$$(tests/lab/kernel-variant table)"
	UPDATE_GOLDEN=1 $(CARGO) test --locked --release --test e2e detect:: -- --nocapture

clean: ## remove what was built here (the lab's cache stays, in ~/.cache/xftrace-lab)
	$(CARGO) clean
	rm -rf demo-results
