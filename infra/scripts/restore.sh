#!/usr/bin/env bash
# Checks every file of a backup against its digest, then puts it into an empty folder.
# Usage: restore.sh BACKUP ROOT
# With CONSILIUM_DATABASE_URL also the PostgreSQL databases, which must be empty or absent.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHONPATH="$here" PYTHONSAFEPATH=1 exec "${PYTHON:-python3}" -m infra.backup restore "$@"
