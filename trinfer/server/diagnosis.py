"""The catalogue: what an engine's last lines mean, and what to do about it.

Rule: a pattern is read only when a start has failed or an engine has died. A line alone never ends an engine that
serves: the same words stand in echoed prompts and in tracebacks of single requests.

Sources: the engines' own messages (vLLM, SGLang, llama.cpp, transformers, huggingface_hub, PyTorch), as quoted in
their public issue trackers; each entry is tested against such a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CATALOGUE", "Diagnosis", "Pattern", "diagnose", "is_port_in_use"]

Kind = Literal["fatal", "resource", "transient"]


@dataclass(frozen=True)
class Pattern:
    """One known failure.

    Attributes:
        name: short name, for tests and reports.
        regex: found anywhere in a line. Its named groups may be used in ``advice``.
        cause, advice: for the user.
        kind: "fatal": the same start will fail again; "resource": it may work once something is free; "transient":
            it may work at once.
        engines: where it applies; empty for all.
    """

    name: str
    regex: re.Pattern[str]
    cause: str
    advice: str
    kind: Kind
    engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What the catalogue makes of an engine's output."""

    name: str
    cause: str
    advice: str
    kind: Kind
    line: str


def _pattern(name: str, regex: str, cause: str, advice: str, kind: Kind, *engines: str) -> Pattern:
    return Pattern(name, re.compile(regex), cause, advice, kind, engines)


# The order is the priority: causes stand before the errors that follow from them.
CATALOGUE: tuple[Pattern, ...] = (
    _pattern(
        "gated-model",
        r"GatedRepoError|[Cc]annot access gated repo|is a gated repo|Access to model .* is restricted",
        "the model is gated: its owners must grant access to it",
        "accept its terms on its model page, and set HF_TOKEN to a token of that account",
        "fatal",
    ),
    _pattern(
        "hub-rate-limit",
        r"429 Client Error|Too Many Requests for url.*huggingface|HfHubHTTPError: 429",
        "the model hub limits the rate of downloads",
        "download the model once beforehand, and set HF_HUB_OFFLINE=1; or wait some minutes",
        "transient",
    ),
    _pattern(
        "hub-unauthorized",
        r"401 Client Error|Invalid credentials in Authorization header|Invalid username or password\.",
        "the model hub refuses the token",
        "set HF_TOKEN to a valid token, or check the model's name",
        "fatal",
    ),
    _pattern(
        "model-not-found",
        r"Repository Not Found for url|RepositoryNotFoundError|is not a local folder and is not a valid model ident"
        r"ifier|Incorrect path_or_model_id|Can't load the configuration of|failed to open GGUF file|No such file or "
        r"directory.*\.gguf|gguf_init_from_file(?:_impl)?: failed to open|LocalEntryNotFoundError|OfflineModeIsEnabled",
        "there is no such model, neither as a path nor on the hub (or the hub cannot be reached)",
        "check model_name_or_path; offline, the model must be in the cache already",
        "fatal",
    ),
    _pattern(
        "corrupt-model",
        r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|invalid magic characters|tensor '.*' data is not "
        r"within the file bounds|PytorchStreamReader failed|Error while deserializing header|failed to read magic",
        "a file of the model is incomplete or corrupt",
        "delete it, and download it again; look for a full disk or an interrupted download",
        "fatal",
    ),
    _pattern(
        "remote-code",
        r"trust_remote_code=True|--trust-remote-code|contains custom code which must be executed",
        "the model comes with code of its own, which runs only when you allow it",
        "read that code, then set trust_remote_code=True in the config",
        "fatal",
    ),
    _pattern(
        "kv-cache-too-small",
        r"max seq len \((?P<wanted>\d+)\).*(?:KV cache|larger than the maximum number of tokens)"
        r"|is larger than the available KV cache memory|No available memory for the cache blocks",
        "the context length needs more memory for the KV cache than is left on the GPU",
        "lower model_max_context, raise gpu_memory_utilization (model_kwargs), or use more GPUs (tp)",
        "fatal",
        "vllm",
    ),
    _pattern(
        "free-memory",
        r"Free memory on device.*is less than desired GPU memory utilization|Not enough memory\. Please try to "
        r"increase --mem-fraction-static",
        "another process holds memory of the GPU, often an orphan of an earlier run",
        "look with `nvidia-smi` who holds it; end that process, or lower gpu_memory_utilization (model_kwargs)",
        "resource",
    ),
    _pattern(
        "gpu-out-of-memory",
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory|cudaMalloc failed: out of memory|CUDA error: out of "
        r"memory|unable to allocate CUDA\d* buffer",
        "the GPU's memory does not suffice for the model and its cache, or somebody else holds part of it",
        "use more GPUs (tp), a smaller model_max_context, or a smaller model; look with `nvidia-smi` who holds memory",
        "resource",
    ),
    _pattern(
        "not-enough-gpus",
        r"World size \(\d+\) is larger than the number of available GPUs|The number of required GPUs exceeds the total"
        r"|[Nn]ot enough GPUs|invalid device ordinal|DP adjusted local rank .* is out of bounds",
        "tp x pp x dp asks for more GPUs than this machine shows",
        "lower tp, pp or dp, or check gpus and CUDA_VISIBLE_DEVICES",
        "fatal",
    ),
    _pattern(
        "no-gpu",
        r"No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device is detected|Failed to infer device "
        r"type|CUDA driver version is insufficient|libcuda\.so\.1: cannot open",
        "the engine sees no usable GPU: none is there, its driver is missing or too old, or none is visible",
        "check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        "fatal",
    ),
    _pattern(
        "unsupported-model",
        r"Model architectures? \[.*\] (?:are|is) not supported|unknown model architecture|Transformers does not "
        r"recognize this architecture|Unrecognized model in",
        "this version of the engine does not know the model's architecture",
        "update the engine, or use another one",
        "fatal",
    ),
    _pattern(
        "heads-not-divisible",
        r"[Tt]otal number of attention heads \(\d+\) must be divisible by tensor parallel size",
        "the model's attention heads cannot be divided by tp",
        "choose another tp, such as 1, 2, 4 or 8",
        "fatal",
    ),
    _pattern(
        "context-too-long",
        r"User-specified max_model_len \((?P<given>\d+)\) is greater than the derived max_model_len",
        "model_max_context is longer than the model allows",
        "lower model_max_context to the length in the model's config.json",
        "fatal",
        "vllm",
    ),
    _pattern(
        "unknown-option",
        r"unrecognized arguments?:? (?P<option>\S+)|error: invalid argument: (?P<argument>\S+)"
        r"|No such option: (?P<name>\S+)|error: argument --?\S+: (?:invalid|expected)",
        "the engine does not know an option, or not such a value of it",
        "check model_kwargs against `--help` of the installed version",
        "fatal",
    ),
    _pattern(
        "missing-dependency",
        r"ModuleNotFoundError: No module named '?(?P<module>[\w.]+)|ImportError: .*(?:No module named"
        r"|cannot import name|cannot open shared object)|command not found",
        "a package that the engine needs is not installed, or does not fit",
        "install it in the engine's environment, or reinstall the engine",
        "fatal",
    ),
    _pattern(
        "shared-memory",
        r"No space left on device.*shm|/dev/shm.*(?:No space|too small)|unable to (?:mmap|allocate shared memory)"
        r"|Bus error|insufficient shared memory",
        "/dev/shm is full or too small",
        "remove what dead engines have left in /dev/shm; in a container, give it more (`--shm-size`)",
        "resource",
    ),
    _pattern(
        "disk-full",
        r"No space left on device|Errno 28|Disk quota exceeded|Errno 122",
        "a disk is full, or its quota is used up",
        "make room, or move caches with HF_HOME, VLLM_CACHE_ROOT and TMPDIR",
        "resource",
    ),
    _pattern(
        "permission",
        r"PermissionError: \[Errno 13\]|EACCES|Permission denied",
        "a file or folder may not be read or written",
        "check the model's files, the caches and the log folder",
        "fatal",
    ),
    _pattern(
        "port-in-use",
        r"[Aa]ddress already in use|EADDRINUSE|couldn't bind HTTP server socket|port \d+ is already in use",
        "a port that the engine wants is taken",
        "look with `ss -tlnp` who holds it; two engines on one machine need different ports",
        "transient",
    ),
    _pattern(
        "llamacpp-load",
        r"failed to load model|error loading model|exiting due to model loading error",
        "llama.cpp could not load the model",
        "check that model_name_or_path is a complete GGUF file that this version can read",
        "fatal",
        "llamacpp",
    ),
    _pattern(
        "cuda-error",
        r"CUDA error: |CUDA driver error|NCCL error|ncclUnhandledCudaError|ncclSystemError",
        "the GPU, its driver or its links to other GPUs had an error",
        "look at `nvidia-smi` and `dmesg` for Xid errors; a restart of the engine often helps",
        "transient",
    ),
)

_PORT_IN_USE = next(pattern.regex for pattern in CATALOGUE if pattern.name == "port-in-use")


def diagnose(lines: Sequence[str], engine: str = "") -> Diagnosis | None:
    """The first entry of the catalogue that is found in the lines, or None.

    Args:
        lines: the engine's last output, oldest first.
        engine: name of the engine; entries for other engines are left out.
    """
    for pattern in CATALOGUE:
        if pattern.engines and engine and engine not in pattern.engines:
            continue
        for line in reversed(lines):
            if pattern.regex.search(line):
                return Diagnosis(pattern.name, pattern.cause, pattern.advice, pattern.kind, line)
    return None


def is_port_in_use(text: str) -> bool:
    """Whether an engine says that its port is taken."""
    return _PORT_IN_USE.search(text) is not None
