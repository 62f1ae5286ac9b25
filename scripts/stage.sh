# Sourced by quickstart.sh. `stage NAME COMMAND...` runs a command once: it is skipped when it succeeded before with the
# same words, the same config files and the same stages before it. Seconds go to $out/stages/NAME.json.
#
# `stage NAME --own FOLDER COMMAND...` is for a command that goes on from what it finds in its folder, which the stage alone
# writes to. FOLDER/.stage_begun says what began there: a killed stage goes on, a changed one begins in the emptied folder.

previous_key=start

# Emptied is only what the stage itself has begun; anything else in the way ends the script.
begin_in() { # FOLDER NAME KEY
    local folder="$1" begun="$1/.stage_begun"
    mkdir -p "$folder" || return
    if [ -f "$begun" ] && [ "$(head -n 1 "$begun")" = "$2" ]; then
        if [ "$(sed -n 2p "$begun")" = "$3" ]; then return; fi
        echo "== $2: changed, $folder is emptied"
        # The record goes last, so that a kill in between leaves no folder without one.
        find "$folder/" -mindepth 1 ! -name .stage_begun -delete || return
    elif [ -n "$(ls -A "$folder")" ]; then
        echo "$folder holds files that the stage '$2' did not begin: remove the folder, or choose another QUICKSTART_DIR" >&2
        return 1
    fi
    printf '%s\n%s\n' "$2" "$3" > "$begun"
}

stage() { # NAME [--own FOLDER] COMMAND...
    local name="$1" key record started word own=""
    shift
    if [ "$1" = --own ]; then own="$2"; shift 2; fi
    mkdir -p "$out/stages"
    record="$out/stages/${name// /_}.json"
    key="$({ echo "$previous_key" "$@"; for word in "$@"; do case "$word" in *.yaml) cat "$word" ;; esac; done; } | cksum | cut -d' ' -f1)"
    previous_key="$key"
    if [ -f "$record" ] && grep -q "\"key\": \"$key\"" "$record"; then
        echo "== $name: reused"
        return
    fi
    rm -f "$record" # from here on what it did before counts no more
    if [ -n "$own" ]; then begin_in "$own" "$name" "$key" || return; fi
    echo "== $name: $*"
    started="$(date +%s.%N)"
    "$@"
    python - "$record" "$name" "$key" "$started" <<'PY'
import json, sys, time
record, name, key, started = sys.argv[1:]
with open(record, "w") as file:
    json.dump({"name": name, "key": key, "started": float(started), "seconds": round(time.time() - float(started), 1)}, file)
PY
}

# Two functions of stages, "FUNCTION WORDS..." each, at the same time and on half of the cores each. The second one's words are
# shown when both have ended; where one fails or is stopped, both end.
side_by_side() { # "FUNCTION WORDS..." "FUNCTION WORDS..."
    local all="$OMP_NUM_THREADS" log second
    log="$(mktemp)"
    export OMP_NUM_THREADS=$(((all + 1) / 2))
    set -m # a process group of its own, to be ended as a whole
    $2 > "$log" 2>&1 < /dev/null &
    second=$!
    set +m
    trap "kill -- -$second 2>/dev/null; rm -f '$log'" EXIT
    $1
    if ! wait "$second"; then cat "$log" >&2; return 1; fi
    cat "$log"
    trap - EXIT
    rm "$log"
    export OMP_NUM_THREADS="$all"
}
