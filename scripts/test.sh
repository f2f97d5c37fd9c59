#!/usr/bin/env bash
# Installs the package with its test tools into .venv (once) and runs the checks and all tests.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
# The models are too small to share a matrix product; waiting threads only slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
