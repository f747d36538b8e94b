# shellcheck shell=bash
# What the checks with foreign clients share: the binary, a Python with the
# clients, and brokers that end with the script. Sourced; the caller has set
# `name`, `root`, `infra` and `work`.
# shellcheck disable=SC2154

say() { echo "$name: $*" >&2; }
fail() {
    say "$*"
    exit 2
}

# foreign_python: sets `python` to an interpreter with the pinned clients.
foreign_python() {
    local venv=$infra/python wanted=$root/tests/foreign/requirements.txt
    python=$venv/bin/python
    # The copy says what was installed, so a changed pin is noticed.
    if [[ ! -x $python ]] || ! cmp -s "$wanted" "$venv/requirements.txt"; then
        say "installing pika and kafka-python into $venv"
        mkdir -p "$infra"
        python3 -c 'import ensurepip, venv' 2>/dev/null || "$root/scripts/brokers" packages python3 python3-venv ||
            fail "a Python with venv is missing"
        python3 -m venv "$venv" >"$work/venv.log" 2>&1 ||
            fail "python3 cannot make a virtual environment (apt-get install python3-venv): $(tail -n 1 "$work/venv.log")"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$wanted" >"$work/venv.log" 2>&1 ||
            fail "pip could not install $(grep -v '^#' "$wanted" | paste -sd ' '): $(tail -n 1 "$work/venv.log")"
        cp "$wanted" "$venv/requirements.txt"
    fi
    export PYTHONDONTWRITEBYTECODE=1
}

# foreign_binary: sets `binary`, built from this tree unless it is given.
foreign_binary() {
    binary=${MESSAGING_HUB_BINARY:-}
    if [[ -z $binary ]]; then
        binary=$(cd "$root" && cargo build --bin messaging-hub --message-format=json 2>"$work/build.log" |
            sed -n 's/.*"executable":"\([^"]*messaging-hub[^"]*\)".*/\1/p' | tail -n 1) || true
        [[ -n $binary ]] || fail "the binary could not be built: $(grep -m 1 -A 3 '^error' "$work/build.log")"
    fi
    [[ -x $binary ]] || fail "there is no binary at $binary"
}

# foreign_broker KIND: starts one that ends with this script, whatever ends it.
foreign_broker() {
    "$root/scripts/brokers" installed "$1" || "$root/scripts/brokers" install "$1"
    "$root/scripts/brokers" start "$1" "$work/$1" --parent-pid $$ --temporary >/dev/null ||
        fail "$1 could not be started"
}

# node KIND FIELD
node() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/$1/node.json" "$2"; }

# Runs the checks as a child that a signal reaches too; it ends its own hub.
foreign_run() {
    "$python" "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

foreign_cleanup() {
    local node
    if [[ -n ${child:-} ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    for node in "$work"/*/spec; do
        [[ ! -e $node ]] || "$root/scripts/brokers" remove "${node%/spec}" || true
    done
    if [[ -n ${keep:-} ]]; then say "the logs are in $work"; else rm -rf "$work"; fi
}
