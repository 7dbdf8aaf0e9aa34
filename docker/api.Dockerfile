# syntax=docker/dockerfile:1
# The front end: API, dashboard, keys, migrations. No torch.
#   docker build --file docker/api.Dockerfile --tag pho-api .

# Pinned by tag. To pin it for good, look up the digest where you pull from, check it, and give
#   --build-arg BASE=python:3.13.9-slim-bookworm@sha256:...
ARG BASE=python:3.13.9-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /source
RUN --mount=type=bind,source=requirements/build.txt,target=/build.txt \
    pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps \
        --requirement /build.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

FROM ${BASE}
RUN useradd --uid 10001 --create-home pho \
    && install --directory --owner=pho --group=pho /data /var/lib/pho/bundles
# Dependencies in a layer of their own, which a change of the code leaves as it is. Each file is
# compared with its hash.
RUN --mount=type=bind,source=requirements/api.txt,target=/requirements.txt \
    pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps \
        --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --root-user-action=ignore --no-deps /wheel/*.whl && pip check

# The hub's library keeps the configurations that plans are made from in HF_HOME.
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/tmp/huggingface \
    PHO_ARTIFACTS=/var/lib/pho/bundles \
    PHO_HOST=0.0.0.0 \
    PHO_WORKERS=0
USER 10001
# Models and texts that jobs may name lie below the folder that the service is started in.
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["pho"]
CMD ["serve"]
