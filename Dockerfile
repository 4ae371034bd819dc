# SCOPE on NVIDIA GPUs (x86-64, driver 580 or newer), as a container for `docker run` and for Vast.ai.
#
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/logs:/workspace/scope/logs" \
#       -v "$PWD/data/fineweb10B:/workspace/scope/data/fineweb10B" IMAGE
#
# The code lies in /workspace/scope: mount volumes below it, since one mounted over /workspace would hide it.

FROM pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime@sha256:bfbb4a2b4fdba0fefdb428ea737e626d61bb3daf74a16e1ff935bdb03aa7c3f0

LABEL org.opencontainers.image.title="SCOPE" \
      org.opencontainers.image.description="Spectral COntext Pointer Encoding: selective attention over long contexts"

# torch.compile builds C (Triton's launchers) and C++ (CPU kernels) against Python's headers when it runs. Versions are not
# pinned, because Ubuntu's archive drops a superseded version, and a pin would then break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The base image's Python belongs to Ubuntu and refuses pip otherwise; a file, unlike ENV, also holds in an SSH session.
RUN printf '[global]\nbreak-system-packages = true\n' > /etc/pip.conf \
    && python -m pip install --no-cache-dir numpy==2.4.6 tqdm==4.70.1

# sshd starts its sessions without the container's environment, and the runs are configured by it: a login shell takes what
# it lacks, and PATH, from process 1.
COPY <<'EOF' /etc/profile.d/container-environment.sh
if [ -n "${BASH_VERSION-}" ] && [ -r /proc/1/environ ]; then
    while IFS= read -r -d '' entry; do
        name=${entry%%=*}
        case $name in
            '' | [0-9]* | *[!A-Za-z0-9_]*) continue ;;
        esac
        if [ "$name" = PATH ] || [ -z "${!name+set}" ]; then
            export "$name=${entry#*=}"
        fi
    done < /proc/1/environ
    unset entry name
fi
EOF

WORKDIR /workspace/scope
COPY . .

# Proofs, without a GPU: the packages satisfy requirements.txt, both compilers work for torch.compile, the script starts.
RUN python -m pip install --no-cache-dir --no-index -r requirements.txt \
    && include="$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    && printf '#include <Python.h>\nint main(void) { return 0; }\n' > /tmp/proof.c \
    && gcc "-I$include" /tmp/proof.c -o /tmp/proof \
    && /tmp/proof \
    && TORCHINDUCTOR_CACHE_DIR=/tmp/proof.d python -c 'import torch; torch.compile(torch.sin, fullgraph=True)(torch.ones(9))' \
    && python scoped_medium.py --help > /dev/null \
    && rm -rf /tmp/proof /tmp/proof.c /tmp/proof.d

CMD ["bash"]
