# shellcheck shell=bash
# What the three challenges share: options, brokers that end with the script, the
# binary, a Python with foreign clients. Sourced; the caller has set `name`,
# `subject` (the words of its usage) and `needs` (rabbitmq, kafka).
# shellcheck disable=SC2154,SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
infra=${MESSAGING_INFRA_DIR:-$root/.infra}
export MESSAGING_INFRA_DIR=$infra

usage() {
    cat <<TEXT
usage: challenges/scripts/$name.sh [options]

$subject

Each check does something to a live broker with the binary, and looks at what came
of it with a client that nobody here wrote (pika, kafka-python, curl's HTTP). Prints
PASS NAME or FAIL NAME: WHY for each, SKIP NAME: WHY for one that cannot be done
here, and a summary. Exit status 0: all passed; 1: not; 2: it could not be run.

  --short            without the slow ones (retry tiers, repeated kills)
  --rabbitmq 3.10|4  which RabbitMQ is started (default 4)
  --only WORD        only checks whose name has this word
  --list             print the names of the checks
  --json FILE        write a report as JSON
  --sabotage NAME    break the subject on purpose, to see which checks notice
                     (--sabotage help lists the ways)
  --keep             leave the logs

environment:
  RABBITMQ_URL, KAFKA_BROKERS  use these brokers instead of starting any. What needs
                               a broker to be killed is skipped then. Queues of the
                               topology must be empty.
  MESSAGING_HUB_BINARY         the binary; default: this tree's, built by cargo
  MESSAGING_INFRA_DIR          where servers and clients are kept (default .infra)
TEXT
}

run_challenge() {
    local more=() version=4 keep_logs='' rabbitmq='' kafka='' words=()
    while (($#)); do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --short | --list) more+=("$1") ;;
            --keep) keep_logs=1 ;;
            --rabbitmq)
                [[ ${2:-} == 3.10 || ${2:-} == 4 ]] || { usage >&2; exit 2; }
                version=$2
                shift
                ;;
            --only | --json | --sabotage)
                [[ -n ${2:-} ]] || { usage >&2; exit 2; }
                more+=("$1" "$2")
                shift
                ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
    keep=$keep_logs child=''
    work=$(mktemp -d "${TMPDIR:-/tmp}/hub-challenge.XXXXXX")
    # shellcheck source=../../scripts/lib/foreign.sh
    source "$root/scripts/lib/foreign.sh"
    trap foreign_cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    foreign_python
    if [[ " ${more[*]-} " == *" --list "* || " ${more[*]-} " == *" --sabotage help "* ]]; then
        "$python" "$root/challenges/lib/${name}.py" "${more[@]}"
        exit
    fi
    foreign_binary
    if [[ $needs == *rabbitmq* ]]; then
        if [[ -n ${RABBITMQ_URL:-} ]]; then
            words+=(--rabbitmq-url "$RABBITMQ_URL")
        else
            foreign_broker "rabbitmq-$version"
            words+=(--rabbitmq-node "$work/rabbitmq-$version")
        fi
    fi
    if [[ $needs == *kafka* ]]; then
        if [[ -n ${KAFKA_BROKERS:-} ]]; then
            words+=(--kafka-servers "$KAFKA_BROKERS")
        else
            foreign_broker kafka-4
            words+=(--kafka-node "$work/kafka-4")
        fi
    fi
    local outcome=0
    foreign_run "$root/challenges/lib/${name}.py" --binary "$binary" --work "$work" \
        --brokers "$root/scripts/brokers" "${words[@]}" "${more[@]+"${more[@]}"}" || outcome=$?
    exit "$outcome"
}
