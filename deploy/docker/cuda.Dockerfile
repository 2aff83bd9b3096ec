# fastrec serve on NVIDIA GPUs: torch, Triton and CuPy beside the wheel; checkpoints are compiled here.
#
#   make wheel
#   docker build -f deploy/docker/cuda.Dockerfile -t fastrec:cuda .
#   docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -v $PWD/models:/models:ro fastrec:cuda
#
# The CUDA libraries come with torch's wheel; the host brings the driver, 580 or newer for CUDA 13.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm
# Triton compiles its launchers with a C compiler at first use.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY dist/*.whl constraints.txt /tmp/dist/
RUN python -m venv /opt/fastrec \
 && wheel="$(ls /tmp/dist/fastrec_kernels-*-cp"$(python -c 'import sys; print("%d%d" % sys.version_info[:2])')"-*.whl)" \
 && /opt/fastrec/bin/pip install --no-cache-dir --only-binary=:all: -c /tmp/dist/constraints.txt "${wheel}[serve,cuda]" \
 && rm -rf /tmp/dist
RUN useradd --uid 10001 --create-home fastrec && install -d -o 10001 -g 10001 /var/cache/fastrec
ENV PATH=/opt/fastrec/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/fastrec/triton CUPY_CACHE_DIR=/var/cache/fastrec/cupy
USER 10001:10001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=2s --start-period=300s CMD \
  ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=1)"]
ENTRYPOINT ["fastrec", "serve"]
CMD ["/models", "--host", "0.0.0.0", "--cache", "/var/cache/fastrec"]
