# fastrec serve on CPUs: numpy, gRPC and the compiled engine, no torch, no compiler.
#
#   make wheel                               # or a release's wheel for CPython 3.12 in dist/
#   docker build -f deploy/docker/cpu.Dockerfile -t fastrec:cpu .
#   docker run --rm -p 8000:8000 -p 8001:8001 -v $PWD/models:/models:ro fastrec:cpu
#
# The wheel must be one for the image's Python (PYTHON). An engine file is served as it is; a checkpoint
# of fastrec.save needs torch to be compiled: save its engine first (docs/runtime.md).
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS install
COPY dist/*.whl constraints.txt /tmp/dist/
RUN python -m venv /opt/fastrec \
 && wheel="$(ls /tmp/dist/fastrec_kernels-*-cp"$(python -c 'import sys; print("%d%d" % sys.version_info[:2])')"-*.whl)" \
 && /opt/fastrec/bin/pip install --no-cache-dir --only-binary=:all: -c /tmp/dist/constraints.txt "${wheel}[serve]" \
 && /opt/fastrec/bin/pip uninstall -y pip \
 && /opt/fastrec/bin/python -m compileall -q /opt/fastrec/lib

FROM python:${PYTHON}-slim-bookworm
COPY --from=install /opt/fastrec /opt/fastrec
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fastrec \
 && install -d -o 10001 -g 10001 /var/cache/fastrec
ENV PATH=/opt/fastrec/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000 8001
# Longer than --drain-s and --linger-s together is the orchestrator's to allow (docs/deploy.md).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=2s --start-period=120s CMD \
  ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=1)"]
ENTRYPOINT ["fastrec", "serve"]
CMD ["/models", "--host", "0.0.0.0", "--cache", "/var/cache/fastrec"]
