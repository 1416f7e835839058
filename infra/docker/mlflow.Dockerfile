# The MLflow server with its sign-in, and what else looks at the databases: migrations and Optuna's dashboard.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/servers
COPY infra/constraints.txt ./
RUN /opt/servers/bin/pip install --constraint constraints.txt mlflow[auth] optuna optuna-dashboard \
      prometheus-flask-exporter psycopg[binary]

FROM python:3.11-slim-bookworm
ENV PATH=/opt/servers/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 erpe && mkdir /artifacts && chown erpe:erpe /artifacts
COPY --from=build /opt/servers /opt/servers
COPY infra/docker/bin /usr/local/bin/
COPY infra/docker/signin.ini /etc/erpe/
USER erpe
WORKDIR /home/erpe
ENTRYPOINT ["with-secrets"]
