"""The catalogue of known failures of engines: what their lines mean, and what to do about it.

Sources: the engines' own messages (vLLM, SGLang, llama.cpp, transformers, huggingface_hub, PyTorch, NCCL), from their
code and as quoted in their public issue trackers; each entry is tested against such a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOGUE", "Kind", "Pattern"]

Kind = Literal["fatal", "resource", "transient"]


@dataclass(frozen=True)
class Pattern:
    """One known failure.

    Attributes:
        name: short name, for tests and reports.
        regex: found anywhere in a line.
        cause, advice: for the user. ``{group}`` stands for a named group of the regex.
        kind: "fatal": the same start will fail again; "resource": it may work once something is free; "transient":
            it may work at once.
        engines: where it applies; empty for all.
        is_symptom: it follows from other failures, and counts only where no cause is found.
        advice_with_groups: advice for the case that all of the regex's groups it names were found.
    """

    name: str
    regex: re.Pattern[str]
    cause: str
    advice: str
    kind: Kind
    engines: tuple[str, ...] = ()
    is_symptom: bool = False
    advice_with_groups: str | None = None

    def applies_to(self, engine: str) -> bool:
        return not self.engines or not engine or engine in self.engines


def _entry(
    name: str,
    *expressions: str,
    cause: str,
    advice: str,
    kind: Kind,
    engines: tuple[str, ...] = (),
    is_symptom: bool = False,
    advice_with_groups: str | None = None,
) -> Pattern:
    regex = re.compile("|".join(expressions))
    return Pattern(name, regex, cause, advice, kind, engines, is_symptom, advice_with_groups)


# On one line the first entry wins: what is specific stands before what is general.
CATALOGUE: tuple[Pattern, ...] = (
    # -- the hub and the model's files --------------------------------------------------------------------------
    _entry(
        "gated-model",
        r"GatedRepoError",
        r"[Cc]annot access gated repo",
        r"trying to access a gated repo",
        r"is a gated repository",
        r"Access to model \S+ is restricted",
        cause="the model is gated: its owners must grant access to it",
        advice="accept its terms on its model page, and set HF_TOKEN to a token of that account",
        kind="fatal",
    ),
    _entry(
        "hub-rate-limit",
        r"429 Client Error",
        r"429 Too Many Requests",
        r"Too Many Requests for url: ?https?://(?:\S*\.)?(?:huggingface\.co|hf\.co)",
        cause="the model hub limits the rate of requests",
        advice="set HF_TOKEN, whose limit is higher; or download the model once beforehand and set HF_HUB_OFFLINE=1",
        kind="transient",
    ),
    _entry(
        "hub-unauthorized",
        r"Invalid credentials in Authorization header",
        r"Invalid user token",
        r"401 Client Error: Unauthorized for url",
        r"Make sure your token has the correct permissions",
        cause="the model hub refuses the token",
        advice="set HF_TOKEN to a valid token that may read this model",
        kind="fatal",
    ),
    _entry(
        "hub-unreachable",
        r"We couldn't connect to 'https?://",
        r"LocalEntryNotFoundError",
        r"OfflineModeIsEnabled",
        r"Cannot reach https?://\S+: offline mode is enabled",
        r"MaxRetryError\(.*host='(?:\S*\.)?(?:huggingface\.co|hf\.co)'",
        r"Failed to resolve '(?:\S*\.)?(?:huggingface\.co|hf\.co)'",
        cause="the model is not complete in the local cache, and the hub cannot be reached",
        advice="check the network and HTTPS_PROXY; without a network, download the model beforehand into HF_HOME",
        kind="transient",
    ),
    _entry(
        "model-not-found",
        r"Repository Not Found for url",
        r"RepositoryNotFoundError",
        r"RevisionNotFoundError",
        r"is not a local folder (?:and is not a valid model identifier|or a valid repository name)",
        r"Invalid repository ID or local directory",
        r"Repo id must be in the form",
        r"Incorrect path_or_model_id",
        r"Can't load the configuration of",
        r"failed to open GGUF file",
        r"gguf_init_from_file\w*: failed to open",
        r"failed to load model, '[^']*': there is no such file",
        cause="there is no such model, neither as a path nor on the hub",
        advice="check model_name_or_path for its spelling; a private model needs HF_TOKEN",
        kind="fatal",
    ),
    _entry(
        "corrupt-model",
        r"SafetensorError",
        r"Error while deserializing header",
        r"PytorchStreamReader failed",
        r"[Tt]ensor '.*' data is not within the file bounds",
        r"invalid magic characters",
        r"failed to read magic",
        r"wrong number of tensors; expected \d+, got \d+",
        r"git-lfs\.github\.com/spec",
        cause="a file of the model is incomplete or corrupt",
        advice="delete it and download it again; look for a full disk, an interrupted download, or git without LFS",
        kind="fatal",
    ),
    _entry(
        "no-weights",
        r"Cannot find any model weights",
        r"Error no file named .*(?:safetensors|pytorch_model).* found in directory",
        cause="the model has no weights in a format that the engine reads",
        advice="complete the download; the engines read *.safetensors, and llama.cpp *.gguf",
        kind="fatal",
    ),
    _entry(
        "remote-code",
        r"trust_remote_code=True",
        r"pass.*--trust-remote-code",
        r"contains custom code which must be executed",
        cause="the model comes with code of its own, which runs only when you allow it",
        advice="read that code, then set trust_remote_code=True in the config",
        kind="fatal",
    ),
    _entry(
        "unsupported-model",
        r"Model architectures? .* (?:are|is) not supported",
        r"unknown model architecture: '(?P<architecture>[^']+)'",
        r"Transformers does not recognize this architecture",
        r"Unrecognized model (?:in|identifier)",
        r"Unsupported architectures?: ",
        r"module transformers has no attribute (?P<class>\w+)",
        cause="this version of the engine does not know the model's architecture",
        advice="update the engine, or use another one",
        kind="fatal",
    ),
    # -- memory of the GPU --------------------------------------------------------------------------------------
    _entry(
        "kv-cache-too-small",
        r"max seq len \(\d+\) is larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<stored>\d+)\)",
        r"larger than the available KV cache memory(?:.*estimated maximum model length is (?P<estimate>\d+))?",
        r"No available memory for the cache blocks",
        cause="the context length needs more memory for the KV cache than is left",
        advice="lower model_max_context, raise gpu_memory_utilization (model_kwargs), or use more GPUs (tp)",
        advice_with_groups="lower model_max_context to {estimate}{stored} or less, raise gpu_memory_utilization "
        "(model_kwargs), or use more GPUs (tp)",
        kind="fatal",
        engines=("vllm", "custom"),
    ),
    _entry(
        "free-memory",
        r"Free memory on device.*\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\).* is less than desired GPU memory",
        r"is less than desired GPU memory utilization",
        cause="another process holds memory that the engine wants, often an orphan of an earlier run",
        advice="look with `nvidia-smi` who holds it; end that process, or lower gpu_memory_utilization (model_kwargs)",
        advice_with_groups="only {free} of {total} GiB are free: look with `nvidia-smi` who holds the rest; end that "
        "process, or lower gpu_memory_utilization (model_kwargs)",
        kind="resource",
    ),
    _entry(
        "free-main-memory",
        r"Available memory on node.*\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\).* is less than desired CPU memory",
        cause="the engine runs on the CPU, and wants a larger share of the main memory than is free",
        advice="lower gpu_memory_utilization (model_kwargs), or set VLLM_CPU_KVCACHE_SPACE (GiB) in env",
        advice_with_groups="only {free} of {total} GiB are free: lower gpu_memory_utilization (model_kwargs), which "
        "means main memory here, or set VLLM_CPU_KVCACHE_SPACE (GiB) in env",
        kind="resource",
        engines=("vllm", "custom"),
    ),
    _entry(
        "static-memory",
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        cause="the model's weights leave no room for the KV cache",
        advice="use more GPUs (tp), a smaller model, or raise mem_fraction_static (model_kwargs); look with "
        "`nvidia-smi` whether somebody else holds memory",
        kind="resource",
        engines=("sglang", "custom"),
    ),
    _entry(
        "gpu-out-of-memory",
        r"(?:CUDA|HIP) out of memory",
        r"torch\.(?:cuda\.)?OutOfMemoryError",
        r"(?:cuda|hip)Malloc failed: out of memory",
        r"(?:CUDA|HIP) error: out of memory",
        r"unable to allocate (?:CUDA|ROCm|Vulkan|SYCL)\w* buffer",
        r"CUBLAS_STATUS_ALLOC_FAILED",
        cause="the GPU's memory does not suffice for the model and its cache, or somebody else holds part of it",
        advice="use more GPUs (tp), a smaller model_max_context, or a smaller model; look with `nvidia-smi` who holds "
        "memory",
        kind="resource",
    ),
    # -- GPUs ---------------------------------------------------------------------------------------------------
    _entry(
        "not-enough-gpus",
        r"World size \((?P<world>\d+)\) is larger than the number of available \w+ \((?P<available>\d+)\)",
        r"world_size \(\d+\) is (?:equal to or )?less than than max local gpu count",
        r"number of required \w+s exceeds the total",
        r"local_world_size \(\d+\) must be less than or equal to the number of visible devices",
        r"[Nn]ot enough GPUs",
        r"invalid device ordinal",
        r"local rank \S+ is out of bounds",
        cause="tp x pp x dp asks for more GPUs than this machine shows",
        advice="lower tp, pp or dp, or check gpus and CUDA_VISIBLE_DEVICES",
        advice_with_groups="{world} are asked for and {available} are there: lower tp, pp or dp, or check gpus and "
        "CUDA_VISIBLE_DEVICES",
        kind="fatal",
    ),
    _entry(
        "no-gpu",
        r"No CUDA GPUs are available",
        r"Found no NVIDIA driver",
        r"no CUDA-capable device is detected",
        r"Failed to infer device type",
        r"CUDA driver version is insufficient",
        r"NVIDIA driver on your system is too old",
        r"libcuda\.so(?:\.1)?: cannot open",
        r"No accelerator \(CUDA.*\) is available",
        r"Torch not compiled with CUDA enabled",
        cause="the engine sees no usable GPU: none is there, its driver is missing or too old, or none is visible",
        advice="check `nvidia-smi`, gpus and CUDA_VISIBLE_DEVICES, and that the engine is built for this machine",
        kind="fatal",
    ),
    _entry(
        "gpu-too-old",
        r"no kernel image is available for execution on the device",
        r"only supported on GPUs with compute capability",
        r"not compatible with the current PyTorch installation",
        cause="the engine's kernels are not made for this kind of GPU",
        advice="use dtype='half' where bfloat16 is the problem (model_kwargs), or a build of the engine for this GPU",
        kind="fatal",
    ),
    # -- the configuration --------------------------------------------------------------------------------------
    _entry(
        "heads-not-divisible",
        r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<tp>\d+)\)",
        r"assert self\.total_num_(?:kv_)?heads % tp_size == 0",
        r"^\S*AssertionError: \d+ is not divisible by \d+",
        cause="the model cannot be divided by tp",
        advice="choose another tp, such as 1, 2, 4 or 8",
        advice_with_groups="{heads} attention heads cannot be divided by {tp}: choose another tp",
        kind="fatal",
    ),
    _entry(
        "context-too-long",
        r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len "
        r"\(\w+=(?P<derived>\d+)",
        r"context_length \(\d+\) is greater than the derived context_length \((?P<longest>\d+)",
        cause="model_max_context is longer than the model allows",
        advice="lower model_max_context to the length in the model's config.json",
        advice_with_groups="lower model_max_context to {derived}{longest}",
        kind="fatal",
    ),
    _entry(
        "unknown-option",
        r"unrecognized arguments?:? (?P<option>\S+)",
        r"error: invalid argument: (?P<invalid>\S+)",
        r"error: argument (?P<bad>-\S+): (?:invalid|expected|ignored)",
        r"error: the following arguments are required: (?P<missing>.+)",
        r"No such option:? '?(?P<unknown>[\w-]+)",
        r"Invalid value for '(?P<value>[^']+)'",
        cause="the engine does not know an option, or not such a value of it",
        advice="check model_kwargs against `--help` of the installed version",
        advice_with_groups="check {option}{invalid}{bad}{missing}{unknown}{value} in model_kwargs against `--help` of "
        "the installed version",
        kind="fatal",
    ),
    _entry(
        "missing-dependency",
        r"ModuleNotFoundError: No module named '?(?P<module>[\w.]+)",
        r"ImportError: .*(?:[Nn]o module named|cannot import name|cannot open shared object|not "
        r"installed|[Mm]issing dependencies)",
        r"GLIBC(?:XX)?_[\d.]+' not found",
        r"operator \S+ does not exist",
        r": command not found$",
        r"error while loading shared libraries: (?P<library>\S+):",
        r"requires `[\w.-]+`\. You can install it with",
        cause="a package that the engine needs is not installed, or does not fit",
        advice="install it in the engine's environment, or reinstall the engine",
        advice_with_groups="install {module}{library} in the engine's environment, or reinstall the engine",
        kind="fatal",
    ),
    _entry(
        "compiler",
        r"Could not find nvcc",
        r"CUDA_HOME environment variable is not set",
        r"Command '\[?'ninja'.* returned non-zero exit status",
        r"ninja: build stopped",
        r"Failed to find C compiler",
        r"fatal error: Python\.h: No such file",
        cause="the engine compiles kernels at its start, and could not",
        advice="install a C++ compiler, Python's headers and the CUDA toolkit of torch's version (CUDA_HOME), or "
        "choose another attention backend (model_kwargs)",
        kind="fatal",
    ),
    # -- the machine --------------------------------------------------------------------------------------------
    _entry(
        "shared-memory",
        r"(?:/dev/shm|shared memory|shm_open|ftruncate).*(?:No space left|[Cc]annot allocate)",
        r"No space left on device: '?/dev/shm",
        r"Error while creating shared memory segment",
        r"unable to allocate shared memory",
        r"insufficient shared memory",
        r"Bus error",
        cause="/dev/shm is full or too small",
        advice="remove what dead engines have left in /dev/shm; in a container, give it more (`--shm-size=10g`, or an "
        "emptyDir with medium: Memory)",
        kind="resource",
    ),
    _entry(
        "disk-full",
        r"No space left on device",
        r"\[Errno 28\]",
        r"Disk quota exceeded",
        r"\[Errno 122\]",
        cause="a disk is full, or its quota is used up",
        advice="make room, or move caches with HF_HOME, VLLM_CACHE_ROOT and TMPDIR",
        kind="resource",
    ),
    _entry(
        "host-out-of-memory",
        r"(?:died|failed|terminated|[Ff]ailed core proc).*(?:exit ?code:? |: )-9\b",
        r"terminated by signal SIGKILL",
        r"^Killed$",
        r"\bMemoryError\b",
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        r"std::bad_alloc",
        r"\[Errno 12\]",
        r"unable to mmap .*Cannot allocate memory",
        r"failed to allocate CPU buffer",
        r"unable to allocate CPU buffer",
        r"oom-kill|Out of memory: Killed process",
        cause="the machine, or this job's share of it, has run out of main memory",
        advice="ask for more memory for the job, or use a smaller model; look into `dmesg` for the OOM killer",
        kind="resource",
    ),
    _entry(
        "too-many-open-files",
        r"Too many open files",
        r"\[Errno 24\]",
        cause="the limit of open files is reached",
        advice="raise it with `ulimit -n 65535` before the start",
        kind="resource",
    ),
    _entry(
        "permission",
        r"PermissionError: \[Errno 13\]",
        r"EACCES",
        r"Permission denied",
        cause="a file or folder may not be read or written",
        advice="check the model's files, the caches (HF_HOME) and the log folder",
        kind="fatal",
    ),
    _entry(
        "port-in-use",
        r"[Aa]ddress already in use",
        r"EADDRINUSE",
        r"couldn't bind HTTP server socket",
        r"[Pp]ort (?:\d+ )?is already in use(?!, trying)",
        r"error while attempting to bind on address",
        cause="a port that the engine wants is taken",
        advice="look with `ss -tlnp` who holds it; two engines on one machine need different ports",
        kind="transient",
    ),
    # -- what follows from other failures -----------------------------------------------------------------------
    _entry(
        "llamacpp-load",
        r"failed to load model",
        r"error loading model",
        r"exiting due to model loading error",
        r"Failed to init server, please check the input params",
        cause="llama.cpp could not load the model",
        advice="check that model_name_or_path is a complete GGUF file that this version can read",
        kind="fatal",
        engines=("llamacpp", "custom"),
        is_symptom=True,
    ),
    _entry(
        "nodes-not-found",
        r"DistNetworkError.*(?:timed out|failed to connect)",
        r"client socket has timed out after \d+",
        r"Timed out after \d+ seconds waiting for clients",
        r"DistStoreError",
        cause="the nodes of the engine did not find each other in time",
        advice="check that all nodes run, and that they reach the first one on master_port",
        kind="transient",
        is_symptom=True,
    ),
    _entry(
        "subprocess-failed",
        r"Engine core initialization failed",
        r"WorkerProc initialization failed",
        r"RPCServer process died before responding",
        r"Worker proc \S+ died unexpectedly",
        r"scheduler died during initialization",
        r"Received sigquit from a child proces",
        cause="one of the engine's own processes failed; the reason stands further up in its output",
        advice="set server_log_folder and read the first error in its file there",
        kind="fatal",
        is_symptom=True,
    ),
    _entry(
        "cuda-error",
        r"CUDA error: ",
        r"CUDA driver error",
        r"NCCL error",
        r"nccl(?:UnhandledCudaError|SystemError|InternalError)",
        r"CUBLAS_STATUS_\w+",
        cause="the GPU, its driver or its links to other GPUs had an error",
        advice="look at `nvidia-smi` and `dmesg` for Xid errors; NCCL_DEBUG=INFO in env tells more",
        kind="transient",
        is_symptom=True,
    ),
)
