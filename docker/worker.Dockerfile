# syntax=docker/dockerfile:1
# A worker, with a CUDA build of torch: the machine needs NVIDIA's driver and container toolkit.
# No FastAPI.
#   docker build --file docker/worker.Dockerfile --tag pho-worker .
# For the CPU alone:
#   docker build ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

FROM python:3.13.9-slim-bookworm AS requirements
WORKDIR /source
COPY pyproject.toml .
# Dependencies in layers of their own, which a change of the code leaves as they are.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['worker'], sep='\n')" > requirements.txt \
    && grep '^torch' requirements.txt > torch.txt

FROM python:3.13.9-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.13.9-slim-bookworm
RUN useradd --uid 10001 --create-home pho \
    && install --directory --owner=pho --group=pho \
        /data /var/lib/pho/bundles /var/lib/pho/tmp /var/cache/pho
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN --mount=type=bind,from=requirements,source=/source/torch.txt,target=/torch.txt \
    pip install --no-cache-dir --root-user-action=ignore --index-url "$TORCH_INDEX" \
        --requirement /torch.txt
RUN --mount=type=bind,from=requirements,source=/source/requirements.txt,target=/requirements.txt \
    pip install --no-cache-dir --root-user-action=ignore --requirement /requirements.txt
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
# It serves nothing that could be asked: the service sees by its heartbeat whether it works.
HEALTHCHECK NONE
ENTRYPOINT ["pho"]
CMD ["worker"]
