#!/usr/bin/env bash
# Backs up one party's folder and databases while its services run.
# Usage: backup.sh ROOT FOLDER [--with-keys] [--without-features]
# With CONSILIUM_DATABASE_URL also the PostgreSQL databases, by pg_dump. PYTHON names the Python.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHONPATH="$here" PYTHONSAFEPATH=1 exec "${PYTHON:-python3}" -m infra.backup save "$@"
