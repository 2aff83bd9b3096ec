# A node of a Ray cluster that serves fastrec's engines (deploy/k8s/ray). KubeRay brings the command.
#
#   make wheel
#   docker build -f deploy/docker/ray.Dockerfile -t fastrec:0.1.0-ray .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm
# KubeRay's probes ask the node with wget.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
COPY dist/*.whl constraints.txt /tmp/dist/
RUN python -m venv /opt/fastrec \
 && wheel="$(ls /tmp/dist/fastrec_kernels-*-cp"$(python -c 'import sys; print("%d%d" % sys.version_info[:2])')"-*.whl)" \
 && /opt/fastrec/bin/pip install --no-cache-dir --only-binary=:all: -c /tmp/dist/constraints.txt "${wheel}[ray]" \
 && rm -rf /tmp/dist
RUN useradd --uid 10001 --create-home fastrec
ENV PATH=/opt/fastrec/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
EXPOSE 6379 8000 8001 8265
CMD ["ray", "start", "--head", "--block"]
