#!/usr/bin/env bash
set -euo pipefail

name=messaging_rabbitmq_challenge
subject="The hub over RabbitMQ: topology, publishing in every form, leases, retries, dead
letters, priorities, schedules, and what becomes of all that when the broker, or the
hub, is killed."
needs="rabbitmq"
# shellcheck source=../lib/challenge.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/challenge.sh"
run_challenge "$@"
