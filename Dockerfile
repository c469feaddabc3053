# syntax=docker/dockerfile:1
# The CUDA base image sets the driver's library paths. The CUDA libraries themselves come with torch's wheels. The digest is that
# of the list for x86-64 and arm64, so both are pinned.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143
FROM ${BASE_IMAGE} AS base

# tini is PID 1 and passes on signals and exit codes. Triton compiles its launchers with gcc. Without the RDMA libraries (1 MB)
# NCCL would use TCP between nodes, silently.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 librdmacm1 python3 python3-dev \
    python3-venv tini \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
 && useradd --uid 10001 --user-group --create-home --home-dir /work job \
 && chgrp 0 /work && chmod g=u /work
# OpenShift runs the image as any user of group 0, which no /etc/passwd knows.
ENV USER=job

# The lock file in parts, so that each becomes a layer of its own. They are pulled and unpacked side by side, and one that did
# not change is not pulled again: CUDA's libraries and torch change less often than the rest, and the code most often.
# requirements-cpu.txt builds an image for machines without a GPU.
FROM base AS lock
ARG REQUIREMENTS=requirements.txt
COPY ${REQUIREMENTS} /lock/all.txt
RUN touch /lock/cudnn.txt /lock/math.txt /lock/cuda.txt \
 && awk '/^[a-z]/ { part = /^nvidia-(cudnn|cusparselt|nccl)/ ? "cudnn" : /^nvidia-(cusolver|cusparse|cufft|curand)/ ? "math" : /^(nvidia|cuda)-/ ? "cuda" : /^(torch|triton)==/ ? "torch" : "rest" } /^[^#]/ { print > "/lock/" part ".txt" }' /lock/all.txt

FROM base
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv

# pip checks the hash of every wheel. The secrets `ca` and `pip` are for builds behind a proxy or a mirror.
ARG INSTALL="[ ! -f /run/secrets/ca.crt ] || export PIP_CERT=/run/secrets/ca.crt; \
[ ! -f /run/secrets/pip.conf ] || export PIP_CONFIG_FILE=/run/secrets/pip.conf; \
[ ! -s /app/lock/\$part.txt ] || pip install --disable-pip-version-check --no-deps --require-hashes --only-binary :all: --requirement /app/lock/\$part.txt"
COPY --from=lock /lock/cudnn.txt /app/lock/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=secret,id=pip,target=/run/secrets/pip.conf,required=false \
    export part=cudnn && eval "$INSTALL"
COPY --from=lock /lock/math.txt /app/lock/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=secret,id=pip,target=/run/secrets/pip.conf,required=false \
    export part=math && eval "$INSTALL"
COPY --from=lock /lock/cuda.txt /app/lock/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=secret,id=pip,target=/run/secrets/pip.conf,required=false \
    export part=cuda && eval "$INSTALL"
COPY --from=lock /lock/torch.txt /app/lock/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=secret,id=pip,target=/run/secrets/pip.conf,required=false \
    export part=torch && eval "$INSTALL"
COPY --from=lock /lock/rest.txt /app/lock/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=secret,id=pip,target=/run/secrets/pip.conf,required=false \
    export part=rest && eval "$INSTALL"

COPY entrypoint.py /app/entrypoint.py
COPY job /app/job
# Fail the build if the packages are incompatible.
RUN python3 -m compileall -q /app \
 && pip check --disable-pip-version-check \
 && python3 -c "import torch, transformers, trl, peft, bitsandbytes, datasets, accelerate, boto3, wandb" \
 && python3 /app/entrypoint.py --version

# The job writes only below /work: mount a volume there. With a driver that is too old, NVIDIA's toolkit would not start the
# container, with words about `cuda>=13.0` that say nothing of the driver. Preflight names the one that is needed.
ENV NVIDIA_DISABLE_REQUIRE=1 \
    HOME=/work \
    FT_OUTPUT_DIR=/work/results \
    HF_HOME=/work/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/work/cache/inductor \
    TRITON_CACHE_DIR=/work/cache/triton \
    CUDA_CACHE_PATH=/work/cache/cuda \
    XDG_CACHE_HOME=/work/cache \
    MPLCONFIGDIR=/work/cache/matplotlib \
    WANDB_CACHE_DIR=/work/cache/wandb \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["tini", "--", "python3", "/app/entrypoint.py"]
CMD ["run"]

ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-job" \
      org.opencontainers.image.description="QLoRA fine-tuning as a batch job: environment variables in, published model out" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
