# `make run` and `make test` need a Rust toolchain and nothing else on a Debian
# or Ubuntu: what is missing they install (as root or with sudo). The rest is
# for who works on the hub.

SHELL := /bin/bash
.DEFAULT_GOAL := help

INFRA_RUN ?= .infra/run
CONFIG    ?=
BENCH     ?=

.PHONY: help run build-tools test lint deny test-infra-start test-infra-stop \
        test-infra-status test-faults acceptance large-spool bench challenges

help:
	@sed -n 's/^## //p' Makefile

## make run                builds the hub and serves (CONFIG=FILE for a configuration)
run: build-tools
	cargo run --release --locked --bin messaging-hub -- serve $(if $(CONFIG),--config $(CONFIG))

## make test               everything that CI runs, against real brokers
test:
	@scripts/run-tests

## make lint               format, clippy, docs, and licences and advisories if cargo-deny is there
lint: build-tools
	cargo fmt --all -- --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features
	@if command -v shellcheck >/dev/null; then shellcheck -x -P SCRIPTDIR -S warning scripts/brokers scripts/test-ca scripts/check-compose scripts/build-tools scripts/run-tests scripts/check-foreign scripts/check-bad-input scripts/check-failover challenges/scripts/*.sh .ci/run; \
	else echo "lint: shellcheck is not installed, the scripts were not checked"; fi
	@if command -v cargo-deny >/dev/null; then cargo deny --all-features check; \
	else echo "lint: cargo-deny is not installed, licences and advisories were not checked (make deny)"; fi

## make deny               licences, advisories, sources; installs cargo-deny first if needed
deny:
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --all-features check

build-tools:
	@scripts/build-tools

## make test-infra-start   RabbitMQ 3.10 and 4, Kafka 4, on ports of their own
test-infra-start:
	@scripts/brokers install all
	@for kind in rabbitmq-3.10 rabbitmq-4 kafka-4; do \
	    if [[ -e $(INFRA_RUN)/$$kind/spec ]]; then scripts/brokers restart $(INFRA_RUN)/$$kind; \
	    else scripts/brokers start $$kind $(INFRA_RUN)/$$kind; fi || exit 1; \
	done
	@echo "export RABBITMQ_3_10_DIR=$(abspath $(INFRA_RUN))/rabbitmq-3.10 RABBITMQ_4_DIR=$(abspath $(INFRA_RUN))/rabbitmq-4 KAFKA_4_DIR=$(abspath $(INFRA_RUN))/kafka-4"

## make test-infra-stop    ends them and deletes their data
test-infra-stop:
	@for kind in rabbitmq-3.10 rabbitmq-4 kafka-4; do scripts/brokers remove $(INFRA_RUN)/$$kind; done

## make test-faults        the whole fault matrix, and the tests named after faults
test-faults: build-tools
	@scripts/brokers install all
	FAULTS=all MESSAGING_REQUIRE_BROKERS=1 cargo test --locked --all-features --test 'fault*' --no-fail-fast -- --nocapture --test-threads=1
	MESSAGING_REQUIRE_BROKERS=1 cargo test --locked --all-features --lib --test rabbitmq --test kafka --test embedded fault_ -- --nocapture

## make acceptance          a steady load through three kills of the broker and one of the hub (release build)
acceptance: build-tools
	@scripts/brokers install all
	ACCEPTANCE=rabbitmq,kafka MESSAGING_REQUIRE_BROKERS=1 cargo test --locked --all-features --release --test faults the_acceptance -- --nocapture

## make large-spool         ten million spooled messages, drained in under 256 MiB (release build, minutes)
large-spool: build-tools
	@scripts/brokers install all
	LARGE_SPOOL=kafka:10000000x16,rabbitmq:1000000x1024 MESSAGING_REQUIRE_BROKERS=1 cargo test --locked --all-features --release --test large_spool -- --nocapture

## make bench              every scenario of `messaging-hub bench` (release build; BENCH='kafka -z 5' for one, with its flags)
bench: build-tools
	@scripts/brokers install rabbitmq-4 kafka-4
	cargo bench --locked --bench scenarios -- $(BENCH)

## make challenges         the hub tried from outside: foreign clients, bad input, killed brokers
challenges: build-tools
	@scripts/brokers install all
	challenges/scripts/messaging_rabbitmq_challenge.sh --rabbitmq 3.10
	challenges/scripts/messaging_rabbitmq_challenge.sh
	challenges/scripts/messaging_kafka_challenge.sh
	challenges/scripts/messaging_hybrid_challenge.sh
	scripts/check-foreign
	scripts/check-bad-input
	scripts/check-failover
