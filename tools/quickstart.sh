#!/usr/bin/env bash
# From a bare machine to shipped tiers: sets up .venv on first use, trains jobs/quickstart.yaml on a generated
# graph, ranks the test split at every dimension, exports the tiers, and prints one table. Needs no download
# after the set-up, and under five minutes on two cores.
# A run that is there already is gone on with, or only shown again: remove runs/quickstart to train anew.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

job=jobs/quickstart.yaml
medscale train "$job" >/dev/null    # prepares the graph, trains, evaluates, exports; its table is part of the next
medscale report "$job"
