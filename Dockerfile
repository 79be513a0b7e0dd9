# redif serve in a container, for a CPU or an NVIDIA GPU:
#
#   docker build --target cpu -t redif:cpu .
#   docker build --target gpu -t redif:gpu .
#   docker run -p 8000:8000 -v "$PWD/student:/student:ro" redif:cpu
#   docker run -p 8000:8000 -v "$PWD/student:/student:ro" --gpus all redif:gpu
#
# The student is mounted, or an id on the Hub is given in place of /student. Keys: -e REDIF_API_KEYS=... For Ray Serve
# the same images run `ray start` and `serve deploy` (docs/deploy/ray.yaml). Linted, and never built or run by us yet.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir -c constraints.txt build setuptools \
    && python -m build --wheel --no-isolation --outdir /wheel .

FROM python:3.11-slim-bookworm AS cpu
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0 REDIF_CACHE=/cache
COPY --from=wheel /wheel /wheel
COPY constraints.txt /wheel/
RUN pip install --no-cache-dir -c /wheel/constraints.txt "$(ls /wheel/*.whl)[cpu,openvino,serve,ray]" \
    && useradd --create-home --uid 10001 redif \
    && install -d -o redif /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["redif"]
CMD ["serve", "/student", "--host", "0.0.0.0", "--port", "8000"]

FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04 AS gpu
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0 REDIF_CACHE=/cache PATH=/opt/redif/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/redif
COPY --from=wheel /wheel /wheel
# No constraints: they pin onnxruntime, whose place onnxruntime-gpu takes.
RUN pip install --no-cache-dir "$(ls /wheel/*.whl)[gpu,serve,ray]" \
    && useradd --create-home --uid 10001 redif \
    && install -d -o redif /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["redif"]
CMD ["serve", "/student", "--host", "0.0.0.0", "--port", "8000", "--device", "cuda"]
