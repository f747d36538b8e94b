#!/usr/bin/env bash
# Breaks the subject of a challenge on purpose, in every way that it knows, and
# says which checks noticed. A check that no way makes fail checks nothing.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: challenges/scripts/mutations.sh rabbitmq|kafka|hybrid [SABOTAGE ...]

Runs the challenge once for each sabotage (default: all that
messaging_CHALLENGE_challenge.sh --sabotage help lists), in its short form, and
prints for each check what made it fail. Exit status 0 when each check was made to
fail by something, 1 when not. Takes some minutes for each.

  --out DIR   keep the reports there (default: a temporary folder)
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case ${1:-} in -h | --help | '') usage; exit 0 ;; esac
which=$1
shift
script=$here/messaging_${which}_challenge.sh
[[ -x $script ]] || { usage >&2; exit 2; }
out=''
if [[ ${1:-} == --out ]]; then out=${2:?a folder} && shift 2; fi
[[ -n $out ]] || { out=$(mktemp -d "${TMPDIR:-/tmp}/hub-mutations.XXXXXX") && trap 'rm -rf "$out"' EXIT; }
mkdir -p "$out"
ways=("$@")
if ((!${#ways[@]})); then
    mapfile -t ways < <("$script" --sabotage help | awk '{ print $1 }')
fi
for way in "${ways[@]}"; do
    outcome=0
    "$script" --short --sabotage "$way" --json "$out/$which-$way.json" >"$out/$which-$way.out" 2>&1 || outcome=$?
    if [[ -e $out/$which-$way.json ]]; then
        tail -n 400 "$out/$which-$way.out" | grep -m 1 -E '^[0-9]+ passed' | sed "s/^/$way: /"
    else
        # The challenge did not get so far as a check: that is noticed too.
        echo "$way: ended with status $outcome before the first check: $(tail -n 1 "$out/$which-$way.out")"
    fi
done
python3 - "$which" "$out" <<'PYTHON'
import glob, json, os, sys
which, out = sys.argv[1:]
killed, names = {}, []
for path in sorted(glob.glob(f"{out}/{which}-*.json")):
    way = os.path.basename(path)[len(which) + 1 : -5]
    for one in json.load(open(path))["checks"]:
        if one["name"] not in killed:
            killed[one["name"]] = []
            names.append((one["name"], one["verdict"]))
        if one["verdict"] == "fail":
            killed[one["name"]].append(way)
skipped = {name for name, verdict in names if verdict == "skip"}
for name, _ in names:
    words = ", ".join(killed[name]) or ("left out of the short form" if name in skipped else "NOTHING")
    print(f"{name}: {words}")
survived = [name for name, _ in names if not killed[name] and name not in skipped]
print(f"{len(names) - len(survived) - len(skipped)} noticed, {len(survived)} noticed nothing, {len(skipped)} left out")
sys.exit(1 if survived else 0)
PYTHON
