# The image of the service: one Python environment, the code that serves, one verified model. `python -m ops image`
# builds it and fills in the arguments; docs/compose.md says how to run it.

# One base for both stages, so that compiled packages meet the Python that they were installed for.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
# PYTHONHASHSEED: compiled files keep sets in one order, so that two builds give the same bytes.
ENV PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONHASHSEED=0 \
    ORT_DISABLE_TELEMETRY=1

# An environment without pip: the base's pip fills it from outside, so no installer is in what is copied later.
RUN python -m venv --without-pip /opt/venv

# The lock comes before the code: editing code leaves this slow step in the cache.
COPY service/requirements.lock /tmp/requirements.lock
# Hashes: a package that was changed on its way or at its source is refused. The cache is a mount and never
# part of a layer, so it may stay, whatever the linter thinks.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/venv/bin/python install --require-hashes --no-deps --no-compile -r /tmp/requirements.lock

# What serving never opens: tests, headers, type stubs and commands of the packages, ONNX Runtime's tools that convert
# models, and its second copy for programs in C (half of its size; Python's module carries its own).
# Libraries are not stripped: the wheels' rewritten ELF files can break.
WORKDIR /opt/venv/lib/python3.11/site-packages
RUN find . -type d -name tests -prune -exec rm -rf {} + \
    && find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.c' -o -name '*.a' \) -delete \
    && find . -name '*_tests.*.so' -delete \
    && find onnxruntime/capi -name 'libonnxruntime.so.*' -delete \
    && rm -rf numpy/f2py numpy/distutils numpy/_pyinstaller \
        onnxruntime/backend onnxruntime/datasets onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
    && find /opt/venv/bin -type f -delete

# Compiled ahead, since a read-only container cannot keep what it compiles. Checked by nothing at start: the files
# cannot change, and a time stamp in them would differ from build to build.
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib

WORKDIR /app
# MODEL is the folder of one artifact, below the project.
ARG MODEL=artifacts/flight-disruption/1.0.0
COPY ${MODEL}/ model/
# Only the chapters that the service imports.
COPY mlops_course/__init__.py mlops_course/blueprint.py mlops_course/serving.py mlops_course/monitoring.py mlops_course/
COPY service/*.py service/

# The modes of the working copy depend on who checked it out; in the image everybody may read and nobody may write.
# The model then has to pass what it must pass at start: digest, hashes, golden requests.
ARG MODEL_DIGEST
RUN : "${MODEL_DIGEST:?say which model this is: --build-arg MODEL_DIGEST=sha256:...}" \
    && find . -type d -exec chmod 755 {} + \
    && find . -type f -exec chmod 444 {} + \
    && python -m compileall -q --invalidation-mode unchecked-hash . \
    && /opt/venv/bin/python -c "import sys; from pathlib import Path; from mlops_course.serving import load_model; load_model(Path('model'), sys.argv[1])" "${MODEL_DIGEST}"


FROM ${PYTHON_IMAGE} AS runtime
# What installs packages is not needed to serve, and helps whoever breaks in.
RUN find /usr -xdev \( -path '*-packages/pip*' -o -path '*-packages/setuptools*' -o -path '*-packages/wheel*' \
        -o -path '*-packages/pkg_resources*' -o -path '*-packages/*distutils*' -o -path '*/ensurepip' -o -path '*/bin/pip*' \) \
    -prune -exec rm -rf {} +

WORKDIR /app
# In the order of change, rarest first: what follows a changed layer is transferred again.
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app/model model
COPY --from=builder /app/mlops_course mlops_course
COPY --from=builder /app/service service

# prod is the default, because it is strict: a container that is told nothing refuses to start.
# 0.0.0.0: on the loopback address nothing outside the container would reach the service.
# ORT_DISABLE_TELEMETRY: ONNX Runtime otherwise keeps a record of its use and sends it to its maker.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    APP_ENV=prod \
    HOST=0.0.0.0 \
    MODEL_URI=/app/model \
    ORT_DISABLE_TELEMETRY=1

# A number needs no entry in /etc/passwd, and Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000

# Ready, not only alive: what waits for this container waits for a verified model.
HEALTHCHECK --interval=3s --timeout=2s --start-period=20s --retries=3 CMD ["python", "-m", "service.health"]

# A list, not a line of shell: a shell would be process 1 and keep SIGTERM to itself.
CMD ["python", "-m", "service"]

# Last, because they change with every commit. The labels answer what this image is without starting it.
ARG GIT_SHA=unknown
ARG CREATED=unknown
ARG SERVICE_VERSION=unknown
ARG MODEL_VERSION=unknown
ARG MODEL_DIGEST
ENV GIT_SHA=${GIT_SHA}
LABEL org.opencontainers.image.title="flight-disruption" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_SHA}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.version="${SERVICE_VERSION}" \
      flight-disruption.model.version="${MODEL_VERSION}" \
      flight-disruption.model.digest="${MODEL_DIGEST}"
