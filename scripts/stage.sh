# Sourced by quickstart.sh. `stage NAME COMMAND...` runs a command once: it is skipped when it succeeded before with the
# same words, the same config files and the same stages before it. Seconds go to $out/stages/NAME.json.

previous_key=start

stage() { # NAME COMMAND...
    local name="$1" key record started word
    shift
    mkdir -p "$out/stages"
    record="$out/stages/${name// /_}.json"
    key="$({ echo "$previous_key" "$@"; for word in "$@"; do case "$word" in *.yaml) cat "$word" ;; esac; done; } | cksum | cut -d' ' -f1)"
    previous_key="$key"
    if [ -f "$record" ] && grep -q "\"key\": \"$key\"" "$record"; then
        echo "== $name: reused"
        return
    fi
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
