#!/bin/sh
# Gives a command its secrets: for each variable NAME_FILE, the first line of that file as NAME.
# They are in no image, no compose file and no process list, only in this process's environment.
set -eu

for variable in CONSILIUM_DATABASE_URL MLFLOW_BACKEND_STORE_URI MLFLOW_FLASK_SERVER_SECRET_KEY \
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
    eval "file=\${${variable}_FILE:-}"
    [ -n "$file" ] || continue
    if [ ! -r "$file" ]; then
        echo "entrypoint: ${variable}_FILE: found no readable file, needed one; make the secret" >&2
        exit 2
    fi
    IFS= read -r value < "$file" || [ -n "$value" ]
    export "$variable=$value"
    unset "${variable}_FILE" value
done

exec "$@"
