# Build from the root of the repository: docker build -f infra/docker/coordinator.Dockerfile .

# The C compiler that pyradiomics needs is in this image, and in no later stage.
FROM python:3.11.14-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /opt/consilium
RUN python -m pip install 'uv>=0.9,<1' \
    && python -m venv .venv
COPY pyproject.toml requirements.lock ./
RUN uv pip install --python .venv/bin/python --require-hashes -r requirements.lock
COPY . .
# What development alone needs goes again, with everything that only it wanted.
RUN uv pip install --python .venv/bin/python --no-deps --editable . \
    && .venv/bin/python -m infra.lock requirements.lock > /tmp/runtime.lock \
    && uv pip sync --python .venv/bin/python --require-hashes /tmp/runtime.lock \
    && uv pip install --python .venv/bin/python --no-deps --editable . \
    && .venv/bin/python -m compileall -q flows fusion infra modalities

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="consilium-coordinator" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 consilium \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin consilium \
    && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build --chown=0:0 /opt/consilium /opt/consilium
# Caches of libraries go to /tmp: everything else but /data is read-only.
ENV PATH=/opt/consilium/.venv/bin:$PATH \
    CONSILIUM_ROOT=/data \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/consilium/infra/docker/entrypoint.sh"]
CMD ["consilium", "serve", "--root", "/data"]
HEALTHCHECK --interval=30s --timeout=20s --start-period=180s --retries=3 \
    CMD ["consilium", "serve", "--check", "--root", "/data"]
