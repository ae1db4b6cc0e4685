"""What nvidia-smi says, with a program of that name that says what we want: there need not be a GPU."""

from __future__ import annotations

import time

import pytest

from trinfer.process import gpus as module
from trinfer.process.gpus import Gpu, GpuUser, gpu_users, gpus, has_nvidia_smi

SAYS = """#!/bin/sh
case "$1" in
  --query-gpu=*)
    echo "0, GPU-a, NVIDIA H200, 143771, 143000, 570.1"
    echo "1, GPU-b, Some GPU, [N/A], [N/A], 570.1";;
  --query-compute-apps=*)
    echo "4711, GPU-a, 771"
    echo "4712, GPU-b, [N/A]";;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def install(text: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return install


def test_devices_and_users(nvidia_smi):
    nvidia_smi(SAYS)
    assert has_nvidia_smi()
    assert gpus() == [
        Gpu(0, "GPU-a", "NVIDIA H200", 143771, 143000, "570.1"),
        Gpu(1, "GPU-b", "Some GPU", 0, 0, "570.1"),
    ]
    assert gpu_users() == [GpuUser(4711, "GPU-a", 771), GpuUser(4712, "GPU-b", 0)]


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "#!/nonexistent\n", "#!/bin/sh\nexec sleep 60\n"])
def test_one_that_fails_or_hangs_says_nothing(nvidia_smi, monkeypatch, text):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    nvidia_smi(text)
    began = time.monotonic()
    assert gpus() is None
    assert gpu_users() is None
    assert time.monotonic() - began < 3


def test_nonsense_is_left_out(nvidia_smi):
    nvidia_smi("#!/bin/sh\necho 'No devices were found'\necho\necho '\\377'\n")
    assert gpus() == []
    assert gpu_users() == []


def test_none_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_nvidia_smi()
    assert gpus() is None
    assert gpu_users() is None
