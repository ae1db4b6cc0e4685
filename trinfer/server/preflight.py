"""What can be known before a start: whether model, GPUs and machine can do what the config asks for.

Rules: a check takes milliseconds (`thorough` ones may take seconds), and an error is certain: what may only be wrong
is a warning. Before each start, errors end it at once; `trinfer doctor` shows everything.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trinfer.config import NEEDS_MODEL
from trinfer.process.gpus import gpu_count, gpu_users, gpus, has_nvidia_smi
from trinfer.server.hub import hub_cache, is_offline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trinfer.config import InferenceConfig

__all__ = ["Finding", "inspect_machine", "preflight", "thorough"]

NEEDS_GPUS = frozenset({"sglang", "vllm"})
USES_HUB_CACHE = frozenset({"sglang", "transformers", "vllm"})  # llama.cpp has a cache of its own
LITTLE_DISK = 5 * 2**30  # bytes
FEW_FILES = 4096
LITTLE_SHM = 2**30  # bytes
BUSY_SHARE = 0.1  # of a GPU's memory, above which somebody else's use is worth a word

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Finding:
    """One result: what was found, and what to do about it."""

    level: Literal["ok", "warning", "error"]
    what: str
    advice: str = ""


def _exists(path: str) -> bool:
    """Whether there is such a path; what cannot be one (too long, no permission) is not there."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def preflight(config: InferenceConfig, *, nodes: int = 1) -> list[Finding]:
    """The checks that cost next to nothing; ``nodes`` share the engine's GPUs."""
    hub = [found for found in _check_hub(config) if found.level == "error"]
    return [*_check_model(config), *hub, *_check_gpu_count(config, nodes)]


def thorough(config: InferenceConfig, program: str | None, *, nodes: int = 1) -> list[Finding]:
    """All checks of a config, those that take seconds included. Blocks."""
    return [
        *_check_program(program),
        *preflight(config, nodes=nodes),
        *(found for found in _check_hub(config) if found.level != "error"),
        *_check_disk(config),
        *_check_gpu_memory(),
    ]


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in {".", ".."}


def _check_model(config: InferenceConfig) -> Iterator[Finding]:
    model = config.model_name_or_path
    if config.server_type not in NEEDS_MODEL:
        return
    if _is_path(model) or (config.server_type == "llamacpp" and model.endswith(".gguf")):
        if _exists(model):
            yield Finding("ok", f"the model {model} is there")
        else:
            yield Finding("error", f"the model {model} does not exist on this machine", "check model_name_or_path")
    elif not _exists(model) and not _HUB_NAME.fullmatch(model):
        yield Finding("warning", f"{model!r} is neither a path that exists nor a name as the Hugging Face hub has them")


def _check_gpu_count(config: InferenceConfig, nodes: int) -> Iterator[Finding]:
    if config.server_type not in NEEDS_GPUS:
        return
    wanted = -(-config.tp * config.pp * config.dp // nodes)
    if config.gpus is not None and len(config.gpus) < wanted:
        yield Finding(
            "error",
            f"tp x pp x dp asks for {wanted} GPUs on this node, and gpus names {len(config.gpus)}",
            "lower tp, pp or dp, or name more GPUs",
        )
        return
    there = gpu_count()
    environ = {**os.environ, **config.env}
    if there is None or "device" in config.model_kwargs or any(name.startswith("VLLM_CPU_") for name in environ):
        return  # no NVIDIA driver, or not meant to be used: the engine knows better
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and config.gpus is None:
        there = min(there, len([one for one in visible.split(",") if one.strip()]))
    if there < wanted:
        yield Finding(
            "error" if there else "warning",  # without any, it may be meant to run on the CPU
            f"tp x pp x dp asks for {wanted} GPUs on this node, and {there} are there",
            "lower tp, pp or dp, or ask for more GPUs (look at CUDA_VISIBLE_DEVICES too)",
        )
    else:
        yield Finding("ok", f"{there} GPUs are there, {wanted} are asked for")


def _check_program(program: str | None) -> Iterator[Finding]:
    if program is None:
        return
    found = shutil.which(program)
    if found is None:
        yield Finding(
            "error", f"the program {program} is not on PATH, or not executable", "install the engine, or set executable"
        )
    else:
        yield Finding("ok", f"the program {program} is {found}")


def _check_hub(config: InferenceConfig) -> Iterator[Finding]:
    model = config.model_name_or_path
    if config.server_type not in NEEDS_MODEL or _is_path(model) or _exists(model):
        return
    name = model.partition(":")[0].replace("/", "--")
    environ = {**os.environ, **config.env}
    if (
        config.server_type not in USES_HUB_CACHE
        or not _HUB_NAME.fullmatch(model)
        or "download_dir" in {option.replace("-", "_") for option in config.model_kwargs}
        or any(name.endswith("_USE_MODELSCOPE") for name in environ)
    ):
        return  # it comes from elsewhere, or is kept elsewhere
    cache = hub_cache(environ)
    if (cache / f"models--{name}").is_dir():
        yield Finding("ok", f"the model {model} is in the cache {cache}, or was begun to be downloaded there")
    elif is_offline(environ):
        yield Finding(
            "error",
            f"the model {model} is not in the cache {cache}, and HF_HUB_OFFLINE forbids to download it",
            "download it where there is a network (`hf download`), or unset HF_HUB_OFFLINE",
        )
    elif "HF_TOKEN" not in environ:
        yield Finding("warning", f"the model {model} will be downloaded; if it is gated, HF_TOKEN must be set")


def _check_disk(config: InferenceConfig) -> Iterator[Finding]:
    folders = (
        {"the cache of models": hub_cache({**os.environ, **config.env})} if config.server_type in NEEDS_MODEL else {}
    )
    if config.server_log_folder is not None:
        folders["the log folder"] = Path(config.server_log_folder)
    for what, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        level: Literal["ok", "warning"] = "ok" if free >= LITTLE_DISK else "warning"
        yield Finding(level, f"{what} {folder} has {free / 2**30:.1f} GiB free", "" if level == "ok" else "make room")


def _check_gpu_memory() -> Iterator[Finding]:
    users = gpu_users() or []
    for gpu in gpus() or ():
        held = [f"pid {user.pid}: {user.used} MiB" for user in users if user.uuid == gpu.uuid]
        words = f"GPU {gpu.index} ({gpu.name}): {gpu.free} of {gpu.total} MiB are free"
        if gpu.total and gpu.free < (1 - BUSY_SHARE) * gpu.total:
            yield Finding("warning", f"{words}; held by {', '.join(held) or 'nobody that can be seen from here'}")
        else:
            yield Finding("ok", words)


def inspect_machine() -> list[Finding]:
    """Limits of this machine and process that engines run into."""
    findings: list[Finding] = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    advice = "" if files >= FEW_FILES else "raise it (ulimit -n) to keep thousands of requests under way"
    findings.append(Finding("warning" if advice else "ok", f"open files: {files}", advice))
    try:
        shm = shutil.disk_usage("/dev/shm").free  # its size matters, nothing is put there
    except OSError:
        pass
    else:
        advice = "" if shm >= LITTLE_SHM else "give the container more (--shm-size): NCCL and engine workers need it"
        findings.append(Finding("warning" if advice else "ok", f"/dev/shm: {shm / 2**30:.1f} GiB free", advice))
    try:
        memory = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        memory = "max"
    if memory.isdigit():
        findings.append(Finding("ok", f"memory limit of the control group: {int(memory) / 2**30:.1f} GiB"))
    seen = gpus()
    if seen:
        findings.append(Finding("ok", f"{len(seen)} GPUs, NVIDIA driver {seen[0].driver}"))
    elif seen is None and has_nvidia_smi():
        advice = "run it by hand, and look into `dmesg` for what the driver says (NVRM, Xid)"
        findings.append(Finding("warning", "nvidia-smi is there, but it fails or does not answer", advice))
    else:
        findings.append(Finding("ok", "no NVIDIA GPU that nvidia-smi knows of"))
    return findings
