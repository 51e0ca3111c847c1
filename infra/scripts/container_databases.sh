#!/usr/bin/env bash
# Saves a party's PostgreSQL databases from a container that alone reaches them, or puts them back
# into the empty databases of a new one.
# Usage: container_databases.sh save|restore FOLDER COMMAND...
# COMMAND runs its further words in the container of PostgreSQL, with standard input and output, as
#   docker compose --env-file coordinator.env -f infra/compose/coordinator.yaml exec -T postgres
#   kubectl -n consilium-coordinator exec -i deploy/postgres --
# Before `restore` stop whatever uses the databases.
set -euo pipefail
umask 077

action=${1:?save or restore}
folder=${2:?the folder of the dumps}
shift 2
[ $# -gt 0 ] || { echo "container_databases: needed the command that reaches PostgreSQL" >&2; exit 2; }
databases=(consilium_prefect consilium_mlflow consilium_mlflow_auth)

fail() {
    echo "container_databases: $*" >&2
    exit 2
}

save() {
    [ ! -e "$folder" ] || fail "found $folder already, needed a new folder"
    mkdir -p "$folder.partial"
    trap 'rm -rf "$folder.partial"' EXIT
    for name in "${databases[@]}"; do
        "$@" pg_dump --username=consilium --format=custom --no-owner --no-privileges "$name" \
            < /dev/null > "$folder.partial/$name.dump"
    done
    (cd "$folder.partial" && sha256sum -- *.dump > SHA256SUMS)
    mv "$folder.partial" "$folder"
}

restore() {
    (cd "$folder" && sha256sum --check --quiet --strict SHA256SUMS) \
        || fail "found a dump that was changed or is missing, needed all as they were saved"
    for name in "${databases[@]}"; do
        tables=$("$@" psql --username=consilium --no-psqlrc --tuples-only --no-align \
            --dbname="$name" < /dev/null --command="SELECT count(*) FROM \
information_schema.tables WHERE table_schema = 'public'")
        [ "$tables" = 0 ] || fail "found tables in $name, needed an empty database"
    done
    for name in "${databases[@]}"; do
        "$@" pg_restore --username=consilium --exit-on-error --single-transaction --no-owner \
            --no-privileges "--dbname=$name" < "$folder/$name.dump"
    done
}

case $action in
    save) save "$@" ;;
    restore) restore "$@" ;;
    *) fail "found '$action', needed save or restore" ;;
esac
