# Needs BuildKit: Docker 23 and later have it on, before that set DOCKER_BUILDKIT=1.
#
#   docker build -t seedpod .                   torch's own CUDA libraries
#   docker build -t seedpod:cpu --target cpu .  no CUDA: laptops and CI
#   docker build -t seedpod:3b --target baked --build-arg MODELS=seedvr2-3b --secret id=hf_token,src=FILE .
#
# Stages: build -> torch-{cpu,gpu} -> packages-{cpu,gpu} (what pip installs) -> made-{cpu,gpu} (nano's weights);
# base (the system, the user) -> runtime-{cpu,gpu} -> cpu, baked, gpu.

ARG BASE_IMAGE=python:3.11-slim-bookworm
# Where pip runs, if that needs settings that the image should not keep; it needs BASE_IMAGE's own Python.
ARG BUILD_IMAGE=${BASE_IMAGE}
# What `baked` adds models to: runtime-gpu or runtime-cpu.
ARG BAKE_ON=runtime-gpu

# ------------------------------------------------------------------ packages

FROM ${BUILD_IMAGE} AS build
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python3 -m venv /opt/venv
COPY requirements/pip.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --require-hashes -r pip.txt

# TORCH_INDEX is searched beside pip's own index. TORCH_VERSION replaces the locked version: nobody here has
# its hashes, so they are not checked.
FROM build AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_VERSION=
COPY requirements/torch-cpu.txt requirements/torch-deps.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$TORCH_VERSION" ]; then set -- "torch==$TORCH_VERSION"; \
    else set -- --require-hashes -r torch-cpu.txt -c torch-deps.txt; fi; \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"

FROM build AS torch-gpu
ARG TORCH_INDEX=
ARG TORCH_VERSION=
COPY requirements/torch.txt requirements/torch-deps.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$TORCH_VERSION" ]; then set -- "torch==$TORCH_VERSION"; \
    else set -- --require-hashes -r torch.txt -c torch-deps.txt; fi; \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"

FROM torch-cpu AS packages-cpu
COPY requirements/run.txt requirements/latents.txt tools/split_packages.sh ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes -r run.txt -r latents.txt && sh split_packages.sh

FROM torch-gpu AS packages-gpu
COPY requirements/run.txt requirements/latents.txt tools/split_packages.sh ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes -r run.txt -r latents.txt && sh split_packages.sh

# ------------------------------------------------------------------ our own

FROM scratch AS source
COPY . /seedpod

FROM packages-cpu AS made-cpu
COPY --from=source /seedpod /seedpod
RUN python /seedpod/tools/make_nano.py /opt/nano && python -m compileall -q /seedpod

FROM packages-gpu AS made-gpu
COPY --from=source /seedpod /seedpod
RUN python /seedpod/tools/make_nano.py /opt/nano && python -m compileall -q /seedpod

# ------------------------------------------------------------------ the image

FROM ${BASE_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* \
    && groupadd --gid 1000 seedpod \
    && useradd --uid 1000 --gid 1000 --home-dir /cache --no-create-home --shell /usr/sbin/nologin seedpod \
    && install -d -m 1777 /cache /workspace /input /output && install -d /runpod-volume

# Any user may run it (`--user`), one without a name too: the home is a folder that all may write.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SEEDPOD_HOST=0.0.0.0
LABEL org.opencontainers.image.title="Seedpod" \
      org.opencontainers.image.description="Open video models from mounted checkpoints" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 8000
USER 1000:1000
WORKDIR /workspace
STOPSIGNAL SIGTERM
# The check itself waits for the boot to end: see tools/ping.py.
HEALTHCHECK --interval=15s --timeout=30m --retries=2 CMD ["/opt/venv/bin/python", "/seedpod/tools/ping.py"]
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/venv/bin/python", "/seedpod/entrypoint.py"]

# What changes rarely comes first; the code comes last.
FROM base AS runtime-cpu
COPY --from=packages-cpu /opt/torch /opt/torch
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=made-cpu /opt/nano /opt/nano
COPY --from=made-cpu /seedpod /seedpod
ARG REVISION=
LABEL org.opencontainers.image.revision=$REVISION

FROM base AS runtime-gpu
COPY --from=packages-gpu /opt/torch/nvidia /opt/torch/nvidia
COPY --from=packages-gpu /opt/torch/triton /opt/torch/triton
COPY --from=packages-gpu /opt/torch/torch /opt/torch/torch
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=made-gpu /opt/nano /opt/nano
COPY --from=made-gpu /seedpod /seedpod
ARG REVISION=
LABEL org.opencontainers.image.revision=$REVISION
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-cpu AS cpu

# MODELS: names of models, separated by spaces. The token is needed for gated repositories only; it is in no
# layer. SEEDPOD_MANIFEST, a file of the build's context, is not there: add entries to models.toml.
FROM ${BAKE_ON} AS baked
ARG MODELS
ARG HF_ENDPOINT=https://huggingface.co
USER root
RUN --mount=type=secret,id=hf_token \
    HF_TOKEN="$(cat /run/secrets/hf_token 2>/dev/null || true)" HF_ENDPOINT="$HF_ENDPOINT" \
    HOME=/tmp/bake XDG_CACHE_HOME=/tmp/bake SEEDPOD_ROOTS=/opt/models \
    sh -c 'mkdir -p /opt/models && python /seedpod/entrypoint.py fetch ${MODELS:?name the models: --build-arg MODELS=...}' \
    && chmod -R a+rX /opt/models && rm -rf /tmp/bake
USER 1000:1000
ENV SEEDPOD_ROOTS=/opt/models:/workspace:/runpod-volume

FROM runtime-gpu AS gpu
