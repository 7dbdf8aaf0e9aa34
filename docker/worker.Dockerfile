# syntax=docker/dockerfile:1
# A worker, with a CUDA build of torch: the machine needs NVIDIA's driver and container toolkit.
# No FastAPI.
#   docker build --file docker/worker.Dockerfile --tag pho-worker .
# For the CPU alone:
#   docker build ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

# Pinned by tag. To pin it for good, look up the digest where you pull from, check it, and give
#   --build-arg BASE=python:3.13.9-slim-bookworm@sha256:...
ARG BASE=python:3.13.9-slim-bookworm

FROM ${BASE} AS torch
WORKDIR /source
COPY pyproject.toml .
COPY requirements/lock.py requirements/
RUN python requirements/lock.py torch > torch.txt

FROM ${BASE} AS wheel
WORKDIR /source
RUN --mount=type=bind,source=requirements/build.txt,target=/build.txt \
    pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps \
        --requirement /build.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

FROM ${BASE}
RUN useradd --uid 10001 --create-home pho \
    && install --directory --owner=pho --group=pho \
        /data /var/lib/pho/bundles /var/lib/pho/tmp /var/cache/pho
# Dependencies in layers of their own, which a change of the code leaves as they are. Each file is
# compared with its hash.
RUN --mount=type=bind,source=requirements/worker.txt,target=/requirements.txt \
    pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps \
        --requirement /requirements.txt
# But for torch and the CUDA libraries that it brings: which build is right depends on the machine.
# With an empty TORCH_INDEX it comes from where pip looks by itself.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN --mount=type=bind,from=torch,source=/source/torch.txt,target=/torch.txt \
    pip install --no-cache-dir --root-user-action=ignore \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement /torch.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --root-user-action=ignore --no-deps /wheel/*.whl && pip check

# TMPDIR also has the locks by which workers of one machine share out its GPUs: mount it in all.
ENV PYTHONUNBUFFERED=1 \
    PHO_ARTIFACTS=/var/lib/pho/bundles \
    PHO_CACHE_DIR=/var/cache/pho \
    HF_HOME=/var/cache/pho/huggingface \
    NUMBA_CACHE_DIR=/var/cache/pho/numba \
    TMPDIR=/var/lib/pho/tmp
USER 10001
# Models and texts that jobs may name lie below the folder that the worker is started in.
WORKDIR /data
# It serves nothing that could be asked: who mounts a place for it sets PHO_LIVENESS_FILE.
HEALTHCHECK NONE
ENTRYPOINT ["pho"]
CMD ["worker"]
