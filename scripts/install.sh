#!/usr/bin/env bash
# Makes .venv in the repository root and installs the package into it with the named extras, at the tested versions of
# scripts/constraints.txt. Does nothing if that is done already.
#   bash scripts/install.sh [extra,...]        (default: no extra)
set -euo pipefail

extras="${1:-}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; none found. Set PYTHON to one." >&2
    return 1
}

stamp=".venv/.installed-${extras:-core}"
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    python="$(find_python)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing into $PWD/.venv (once; a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt \
        -e ".${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
fi
