#!/usr/bin/env bash
# Writes the coordinator's secrets, each new and random, as the files that compose/coordinator.yaml
# mounts. Never replaces one that exists. Add tls.crt and tls.key yourself.
# Usage: make_secrets.sh FOLDER [ADMIN_NAME]
set -euo pipefail
umask 077

folder=${1:?the folder of the secrets}
admin=${2:-lead}
[[ $admin =~ ^[a-z][a-z0-9-]{0,39}$ ]] || {
    echo "make_secrets: found the name '$admin', needed lower-case letters, digits and hyphens" >&2
    exit 2
}
mkdir -p "$folder"
if [ -e "$folder/postgres_password" ]; then
    echo "make_secrets: found secrets in the folder already, needed none; name another folder" >&2
    exit 2
fi

random() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}
put() { # put NAME OWNER VALUE: for the user of that id in the containers
    printf '%s\n' "$3" > "$folder/$1"
    chmod 400 "$folder/$1"
    if [ "$(id -u)" = 0 ]; then chown "$2:$2" "$folder/$1"; fi
}

postgres=$(random) access=$(random) secret=$(random) password=$(random)
server="consilium:$postgres@postgres:5432/consilium"
put postgres_password 999 "$postgres"
put database_url 10001 "postgresql://$server"
put mlflow_database_url 10001 "postgresql+psycopg://${server}_mlflow"
put mlflow_session_key 10001 "$(random)"
put mlflow_username 10001 "$admin"
put mlflow_password 10001 "$password"
put s3_access_key 10001 "$access"
put s3_secret_key 10001 "$secret"
put s3_accounts.json 10001 "{\"identities\": [{\"name\": \"mlflow\", \
\"credentials\": [{\"accessKey\": \"$access\", \"secretKey\": \"$secret\"}], \
\"actions\": [\"Admin\", \"Read\", \"List\", \"Tagging\", \"Write\"]}]}"
put basic_auth.ini 10001 "[mlflow]
default_permission = NO_PERMISSIONS
grant_default_workspace_access = false
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
database_uri = postgresql+psycopg://${server}_mlflow_auth
admin_username = $admin
admin_password = $password"
if [ "$(id -u)" != 0 ]; then
    echo "make_secrets: not root, so give the files to 10001, and postgres_password to 999" >&2
fi
echo "make_secrets: wrote $folder; the MLflow account of $admin is in mlflow_password"
