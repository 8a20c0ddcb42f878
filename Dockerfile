# The server on CPUs, without PyTorch:
#
#   docker build -t nano-gpt-api .
#   docker run -p 5000:5000 nano-gpt-api
#
# For a GPU: docker build -f Dockerfile.cuda -t nano-gpt-api .    More in docs/deployment.md.

FROM python:3.13-slim-trixie AS build

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt CMakeLists.txt LICENSE README.md ./
COPY nanogpt/ ./nanogpt/

# The versions are those that the tests ran with. Where packages come from another index than PyPI:
# docker build --secret id=pip,src=$HOME/.config/pip/pip.conf …
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
# redis,otel for traces as well.
ARG EXTRAS=redis
# Left out, a fifth of the image: NumPy's tests, debugging symbols, and the client with which tokenizers would download
# from the Hugging Face Hub. This server downloads nothing. (NumPy's libraries were patched after they were linked, which
# strip does not bear.)
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir ".[${EXTRAS}]" \
    && pip --python /opt/venv/bin/python uninstall --yes \
        huggingface-hub hf-xet fsspec filelock httpx2 httpcore2 anyio h11 pyyaml tqdm \
    && find /opt/venv/lib/python3.*/site-packages/numpy -type d -name tests -prune -exec rm -r {} + \
    && find /opt/venv/lib -name '*.so' -not -path '*/numpy*' -exec strip --strip-unneeded {} + \
    && /opt/venv/bin/python -I -c 'import nanogpt._kernels, llguidance, pydantic, tiktoken, tokenizers'

# log/ may not exist, which COPY alone would not forgive; and its files may be readable by their owner only.
COPY . /app/
RUN mkdir -p /app/log && chmod -R a+rX /app


FROM python:3.13-slim-trixie

# A number, so that Kubernetes can see that it is not root.
RUN useradd --uid 10001 --no-create-home --home-dir /var/cache/nanogpt --shell /usr/sbin/nologin nanogpt \
    && install -d -o nanogpt -g nanogpt -m 700 /var/cache/nanogpt

WORKDIR /app
COPY --from=build /opt/venv/ /opt/venv/
COPY --from=build /app/gunicorn.conf.py /app/deploy/docker/healthcheck.py ./
COPY --from=build /app/web/ ./web/
COPY --from=build /app/log/ ./log/

# TMPDIR: sockets, counters and gunicorn's heartbeat lie in memory, and a read-only root needs no other place for them.
# NANOGPT_CACHE_DIR: packed weights; mount a volume there and the next start maps them instead of packing again.
ENV PATH=/opt/venv/bin:$PATH \
    HOST=0.0.0.0 \
    PORT=5000 \
    TMPDIR=/dev/shm \
    NANOGPT_CACHE_DIR=/var/cache/nanogpt

USER 10001
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "/app/healthcheck.py"]
CMD ["gunicorn", "web.serve:app"]
