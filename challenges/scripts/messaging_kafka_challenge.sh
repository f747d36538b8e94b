#!/usr/bin/env bash
set -euo pipefail

name=messaging_kafka_challenge
subject="The hub over Kafka: topics, publishing in every form, keys and order, groups,
offsets, streams, replays, dead letters, and what becomes of all that when the
broker, or the hub, is killed."
needs="kafka"
# shellcheck source=../lib/challenge.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/challenge.sh"
run_challenge "$@"
