# erpe and Ray. TORCH_INDEX: where torch's wheels are; empty: PyPI, whose build needs CUDA's packages and gigabytes.
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && python -m venv /opt/erpe
WORKDIR /src
COPY pyproject.toml infra/constraints.txt ./
# What erpe needs, before erpe: this layer stays when only our code changes.
RUN mkdir erpe && echo '__version__ = "0"' >erpe/__init__.py && touch README.md \
 && /opt/erpe/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt ".[all,cluster,s3]" \
 && /opt/erpe/bin/pip uninstall --yes erpe && rm -r erpe build
COPY README.md ./
COPY erpe erpe
RUN /opt/erpe/bin/pip install --no-deps .

FROM python:3.11-slim-bookworm
ENV PATH=/opt/erpe/bin:$PATH PYTHONUNBUFFERED=1
# Volumes take the owner of the folder they are first mounted over. HOME is for Ray and matplotlib.
RUN useradd --create-home --uid 1000 erpe && mkdir /home/erpe/runs /data && chown erpe:erpe /home/erpe/runs /data
COPY --from=build /opt/erpe /opt/erpe
COPY infra/docker/bin /usr/local/bin/
USER erpe
WORKDIR /home/erpe
ENTRYPOINT ["erpe-node"]
CMD ["--help"]
