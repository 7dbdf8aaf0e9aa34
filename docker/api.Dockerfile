# syntax=docker/dockerfile:1
# The front end: API, dashboard, keys, migrations. No torch.
#   docker build --file docker/api.Dockerfile --tag pho-api .

FROM python:3.13.9-slim-bookworm AS requirements
WORKDIR /source
COPY pyproject.toml .
# Dependencies in a layer of their own, which a change of the code leaves as it is.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['api'], sep='\n')" > requirements.txt

FROM python:3.13.9-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.13.9-slim-bookworm
RUN useradd --uid 10001 --create-home pho && install --directory --owner=pho --group=pho /data
RUN --mount=type=bind,from=requirements,source=/source/requirements.txt,target=/requirements.txt \
    pip install --no-cache-dir --root-user-action=ignore --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --root-user-action=ignore --no-deps /wheel/*.whl && pip check

ENV PYTHONUNBUFFERED=1 \
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
