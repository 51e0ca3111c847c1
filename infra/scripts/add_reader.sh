#!/usr/bin/env bash
# Lets a person read one study's models in the consortium's registry, and prints the password of a
# new account, once.
# Usage: add_reader.sh STUDY NAME
# CONSILIUM_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD name the registry and
# its administrator, CONSILIUM_CA_FILE authorities of your own. PYTHON names the Python.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHONPATH="$here" PYTHONSAFEPATH=1 exec "${PYTHON:-python3}" -m infra.readers "$@"
