# Sourced by quickstart.sh, test.sh and gpu_check.sh: finds or makes the Python environment and puts it first on PATH.
#
# One environment per content of requirements.txt + constraints.txt and Python version, outside the clone and shared by all
# clones: ${ALICE_ENV_DIR:-~/.cache/alice}/env-HASH. Variables:
#   ALICE_ENV_DIR   where environments are kept
#   ALICE_VENV      use this ready environment instead (nothing is installed into it); current = the python on PATH
#   PYTHON          the interpreter that makes the environment (default python3; 3.10 or newer)

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

make_environment() { # DIRECTORY
    echo "Making the Python environment in $1 (once; about 6.5 GB, a few minutes)"
    # The file "complete" comes last: an install that was cut short lacks it and is made again.
    rm -rf "$1" \
        && "$PYTHON" -m venv "$1" \
        && "$1/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$repository/requirements.txt" -c "$repository/constraints.txt" \
        && touch "$1/complete"
}

warn_of_missing_packages() {
    python - "$repository/requirements.txt" <<'END' >&2
import re, sys
from importlib import metadata

missing = []
for line in open(sys.argv[1]):
    if name := re.match(r"[\w-]+", line):
        try:
            metadata.version(name[0])
        except metadata.PackageNotFoundError:
            missing.append(name[0])
if missing:
    print(f"warning: {sys.executable} lacks packages of requirements.txt: {', '.join(missing)}")
END
}

use_environment() {
    PYTHON="${PYTHON:-python3}"
    if [ "${ALICE_VENV:-}" = current ]; then
        command -v python >/dev/null || { echo "ALICE_VENV=current, but PATH has no 'python'" >&2; return 1; }
        warn_of_missing_packages
        return
    fi
    if [ -n "${ALICE_VENV:-}" ]; then
        [ -x "$ALICE_VENV/bin/python" ] || { echo "ALICE_VENV=$ALICE_VENV holds no bin/python" >&2; return 1; }
        export PATH="$ALICE_VENV/bin:$PATH"
        warn_of_missing_packages
        return
    fi
    local version hash directory
    version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
        || { echo "No Python interpreter called '$PYTHON'; set PYTHON to a Python >= 3.10" >&2; return 1; }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || { echo "Python >= 3.10 is needed, '$PYTHON' is $version; set PYTHON to a newer one" >&2; return 1; }
    hash="$(cat "$repository/requirements.txt" "$repository/constraints.txt" | cksum | cut -d' ' -f1)"
    directory="${ALICE_ENV_DIR:-$HOME/.cache/alice}/env-py$version-$hash"
    mkdir -p "$(dirname "$directory")"
    if [ ! -f "$directory/complete" ]; then
        ( # two runs at once wait for each other where flock exists
            if command -v flock >/dev/null; then flock 9; fi
            [ -f "$directory/complete" ] || make_environment "$directory"
        ) 9>"$directory.lock" || { echo "The environment in $directory could not be made" >&2; return 1; }
    fi
    export PATH="$directory/bin:$PATH"
}

use_environment
