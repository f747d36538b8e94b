#!/usr/bin/env bash
set -euo pipefail

name=messaging_hybrid_challenge
subject="The hub over RabbitMQ and Kafka at once, with the embedded broker to fall back on:
routing, failover of each while the other goes on, draining, order, idempotence,
what operators see and do, and leaving well."
needs="rabbitmq kafka"
# shellcheck source=../lib/challenge.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/challenge.sh"
run_challenge "$@"
