#!/usr/bin/env bash
# Everything that must hold before a change goes in: ruff, mypy --strict, the whole fast suite.
# Arguments go to pytest: bash tools/test.sh -m slow, bash tools/test.sh tests/test_jobfile.py -k preset -n 0
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
