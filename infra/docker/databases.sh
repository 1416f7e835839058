#!/bin/sh
# Run by PostgreSQL's image on an empty volume: a database and a role each for Optuna and MLflow, since both would
# otherwise claim the table `alembic_version`; no role sees the other's.
set -eu
for name in optuna mlflow; do
  psql -q -v ON_ERROR_STOP=1 -U postgres -d postgres -v name="$name" -v password="$(cat "/run/secrets/${name}_password")" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
psql -q -v ON_ERROR_STOP=1 -U postgres -d mlflow -c 'CREATE SCHEMA signin AUTHORIZATION mlflow'
