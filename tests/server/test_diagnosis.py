"""`trinfer.server.diagnosis`: every entry of the catalogue against lines that engines have really written."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.server.catalogue import CATALOGUE
from trinfer.server.diagnosis import KILLED, diagnose, is_port_in_use

# (entry, engine, line). Short excerpts of logs in public issues (named where there is one), of runs of ours, and of the
# messages in the engines' code.
LINES = [
    ("gated-model", "vllm", "OSError: You are trying to access a gated repo."),
    (
        "gated-model",
        "sglang",
        "Cannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct/resolve/main/config"
        ".json.",
    ),  # sgl-project/sglang#14644
    (
        "gated-model",
        "vllm",
        "Access to model google/gemma-2-2b-it is restricted. You must have access to it and be authenticated to access "
        "it. Please log in.",
    ),
    (
        "gated-model",
        "transformers",
        "huggingface_hub.utils._errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-6604c5e0)",
    ),
    (
        "hub-rate-limit",
        "vllm",
        "requests.exceptions.HTTPError: 429 Client Error: Too Many Requests for url: https://huggingface.co/meta-llama/"
        "Meta-Llama-3-8B/resolve/main/config.json",
    ),  # huggingface/transformers#34841
    ("hub-rate-limit", "vllm", "429 Too Many Requests: you have reached your 'api' rate limit."),
    (
        "hub-unauthorized",
        "vllm",
        "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/api/whoami-v2",
    ),
    ("hub-unauthorized", "", "Invalid credentials in Authorization header"),
    (
        "hub-unreachable",
        "vllm",
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
        "cached files.",
    ),
    (
        "hub-unreachable",
        "vllm",
        "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://huggingface.co/api/models/x/y: offline mode "
        "is enabled.",
    ),
    (
        "model-not-found",
        "vllm",
        "OSError: nope/nope is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'",
    ),
    ("model-not-found", "sglang", "Repository Not Found for url: https://huggingface.co/api/models/nope/nope."),
    ("no-weights", "vllm", "RuntimeError: Cannot find any model weights with `/models/empty`"),
    (
        "no-weights",
        "transformers",
        "OSError: Error no file named model.safetensors, or pytorch_model.bin, found in directory /models/empty.",
    ),
    ("model-not-found", "llamacpp", "gguf_init_from_file: failed to open GGUF file 'nope.gguf'"),
    ("model-not-found", "llamacpp", "failed to load model, '/nope.gguf': there is no such file"),
    (
        "corrupt-model",
        "vllm",
        "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
    ),  # QwenLM/Qwen3-VL#264
    ("corrupt-model", "vllm", "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge"),
    (
        "corrupt-model",
        "llamacpp",
        "llama_model_load: error loading model: tensor 'blk.3.attn_qkv.weight' data is not within the file bounds, "
        "model is corrupted or incomplete",
    ),  # moly-ai/moly-local#13
    (
        "corrupt-model",
        "llamacpp",
        "llama_model_load: error loading model: done_getting_tensors: wrong number of tensors; expected 255, got 254",
    ),  # ggml-org/llama.cpp#10759
    ("corrupt-model", "vllm", "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central"),
    (
        "remote-code",
        "vllm",
        "Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
    ),
    (
        "unsupported-model",
        "vllm",
        "(APIServer pid=7)   Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported "
        "architectures: dict_keys([...])",
    ),
    ("unsupported-model", "transformers", "AttributeError: module transformers has no attribute FooForCausalLM"),
    ("unsupported-model", "llamacpp", "llama_model_load: error loading model: unknown model architecture: 'foo'"),
    (
        "unsupported-model",
        "transformers",
        "ValueError: The checkpoint you are trying to load has model type `foo` but Transformers does not recognize "
        "this architecture.",
    ),
    (
        "kv-cache-too-small",
        "vllm",
        "(EngineCore_DP0 pid=1094) ValueError: To serve at least one request with the models's max seq len (262144), "
        "(24.0 GiB KV cache is needed, which is larger than the available KV cache memory (3.18 GiB). Based on the "
        "available memory, the estimated maximum model length is 34736. Try increasing `gpu_memory_utilization` or "
        "decreasing `max_model_len` when initializing the engine.",
    ),  # vllm-project/vllm#34076
    (
        "kv-cache-too-small",
        "vllm",
        "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be stored in "
        "KV cache (7344). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`",
    ),  # QwenLM/Qwen3#295
    (
        "kv-cache-too-small",
        "vllm",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
    ),
    (
        "free-memory",
        "vllm",
        "(EngineCore_DP0 pid=17374) ValueError: Free memory on device (3.22/4.0 GiB) on startup is less than desired "
        "GPU memory utilization (0.9, 3.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
        "processes.",
    ),  # vllm-project/vllm#25837
    (
        "free-main-memory",
        "vllm",
        "(Worker pid=8) ValueError: Available memory on node 0 (15.2/23.48 GiB) on startup is less than desired CPU "
        "memory utilization (0.92, 21.6 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the "
        "fraction of CPU memory reserved (despite its name).",
    ),
    (
        "static-memory",
        "sglang",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: "
        "self.server_args.mem_fraction_static=0.2",
    ),  # gpustack/gpustack#3831
    (
        "gpu-out-of-memory",
        "vllm",
        "(VllmWorker rank=1 pid=194255) ERROR 05-08 14:46:12 [multiproc_executor.py:435] torch.OutOfMemoryError: CUDA "
        "out of memory. Tried to allocate 270.00 MiB. GPU 1 has a total capacity of 21.98 GiB of which 156.94 MiB is "
        "free.",
    ),  # vllm-project/vllm#17835
    (
        "gpu-out-of-memory",
        "llamacpp",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: out of "
        "memory",
    ),  # ggml-org/llama.cpp#20431
    ("gpu-out-of-memory", "llamacpp", "llama_model_load: error loading model: unable to allocate CUDA0 buffer"),
    (
        "not-enough-gpus",
        "vllm",
        "  Value error, World size (4) is larger than the number of available GPUs (2) in this node. If this is "
        "intentional and you are using:",
    ),
    (
        "not-enough-gpus",
        "vllm",
        "(EngineCore_DP0 pid=570282) AssertionError: local_world_size (16) must be less than or equal to the number of "
        "visible devices (8).",
    ),  # vllm-project/vllm#28873
    (
        "not-enough-gpus",
        "vllm",
        "ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group.",
    ),  # vllm-project/vllm#7107
    (
        "not-enough-gpus",
        "vllm",
        "RuntimeError: please ensure that world_size (2) is less than than max local gpu count (1)",
    ),  # vllm-project/vllm#15217
    ("not-enough-gpus", "sglang", "RuntimeError: CUDA error: invalid device ordinal"),
    ("no-gpu", "vllm", "RuntimeError: No CUDA GPUs are available"),
    ("no-gpu", "sglang", "RuntimeError: Found no NVIDIA driver on your system."),
    ("no-gpu", "vllm", "RuntimeError: Failed to infer device type, please set the environment variable"),
    ("no-gpu", "sglang", "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory"),
    ("gpu-too-old", "vllm", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    (
        "gpu-too-old",
        "vllm",
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has "
        "compute capability 7.5.",
    ),
    (
        "heads-not-divisible",
        "vllm",
        "  Value error, Total number of attention heads (14) must be divisible by tensor parallel size (4).",
    ),
    ("heads-not-divisible", "sglang", "    assert self.total_num_heads % tp_size == 0"),
    (
        "context-too-long",
        "vllm",
        "  Value error, User-specified max_model_len (9999) is greater than the derived max_model_len "
        "(max_position_embeddings=2048 or model_max_length=None in model's config.json).",
    ),
    (
        "context-too-long",
        "sglang",
        "ValueError: Warning: User-specified context_length (40000) is greater than the derived context_length (2048).",
    ),
    ("unknown-option", "vllm", "vllm serve: error: unrecognized arguments: --bogus"),
    ("unknown-option", "llamacpp", "error: invalid argument: --bogus"),
    ("unknown-option", "transformers", "Error: No such option '--bogus'."),
    ("unknown-option", "transformers", "│ No such option: --bogus                          │"),
    ("unknown-option", "sglang", "launch_server.py: error: argument --tp-size: invalid int value: 'two'"),
    ("missing-dependency", "sglang", "ModuleNotFoundError: No module named 'sgl_kernel'"),
    (
        "missing-dependency",
        "transformers",
        "ImportError: Missing dependencies for serving. Install with `pip install transformers[serving]`",
    ),
    (
        "missing-dependency",
        "transformers",
        "ValueError: Using a `device_map`, `tp_plan`, `torch.device` context manager or setting "
        "`torch.set_default_device(device)` requires `accelerate`. You can install it with `pip install accelerate`",
    ),
    ("missing-dependency", "vllm", "RuntimeError: operator torchvision::nms does not exist"),
    (
        "missing-dependency",
        "llamacpp",
        "llama-server: error while loading shared libraries: libcublas.so.12: cannot open shared object file: No such "
        "file or directory",
    ),
    (
        "compiler",
        "vllm",
        "(EngineCore_0 pid=1179302) ERROR 08-19 13:12:57 [core.py:708] subprocess.CalledProcessError: Command "
        "'['ninja', '-v', '-C', '/home/u/.cache/flashinfer/86/cached_ops']' returned non-zero exit status 1.",
    ),  # vllm-project/vllm#23176
    (
        "shared-memory",
        "vllm",
        "NCCL WARN Error while creating shared memory segment /dev/shm/nccl-pZafXL (size 7340384)",
    ),  # MiniMax-AI/MiniMax-01#42
    ("shared-memory", "sglang", "OSError: [Errno 28] No space left on device: '/dev/shm/psm_0a1b'"),
    ("disk-full", "vllm", "OSError: [Errno 28] No space left on device"),
    ("disk-full", "vllm", "OSError: [Errno 122] Disk quota exceeded"),
    (
        "host-out-of-memory",
        "sglang",
        "RuntimeError: Rank 3 scheduler died during initialization (exit code: -9). If exit code is -9 (SIGKILL), a "
        "common cause is the OS OOM killer. Run `dmesg -T | grep -i oom` to check.",
    ),
    (
        "host-out-of-memory",
        "vllm",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
        "{'EngineCore_DP0': -9}",
    ),
    ("host-out-of-memory", "custom", "Killed"),
    ("host-out-of-memory", "llamacpp", "llama_model_load: error loading model: unable to allocate CPU buffer"),
    ("too-many-open-files", "vllm", "OSError: [Errno 24] Too many open files"),
    ("permission", "transformers", "PermissionError: [Errno 13] Permission denied: '/cache/hub'"),
    (
        "port-in-use",
        "custom",
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 18112): address already in use",
    ),
    (
        "port-in-use",
        "llamacpp",
        "0.00.021.001 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18112",
    ),
    ("port-in-use", "vllm", "OSError: [Errno 98] Address already in use"),
    (
        "port-in-use",
        "sglang",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port:"
        " 9810, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    ("llamacpp-load", "llamacpp", "0.00.020.100 E srv    load_model: failed to load model, 'model.gguf'"),
    (
        "llamacpp-load",
        "llamacpp",
        "RuntimeError: Failed to init server, please check the input params.",
    ),
    (
        "nodes-not-found",
        "vllm",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect to "
        "(10.0.0.1, 9810).",
    ),
    (
        "subprocess-failed",
        "vllm",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ),
    (
        "subprocess-failed",
        "sglang",
        "Received sigquit from a child process. It usually means the child failed.",
    ),
    (
        "cuda-error",
        "vllm",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
        "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5",
    ),
    ("cuda-error", "", "RuntimeError: CUDA error: an illegal memory access was encountered"),
]


@pytest.mark.parametrize(("name", "engine", "line"), LINES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(LINES)])
def test_the_line_is_recognised(name, engine, line):
    found = diagnose(["some line before", line, "and one after"], engine)
    assert found is not None
    assert (found.name, found.line) == (name, line)
    assert found.cause
    assert found.advice
    assert "{" not in found.cause + found.advice


def test_every_entry_has_a_line():
    assert {pattern.name for pattern in CATALOGUE} == {name for name, _, _ in LINES}
    assert len({pattern.name for pattern in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("kv-cache-too-small", "vllm", "34736"),
        ("kv-cache-too-small", "vllm", "7344"),
        ("free-memory", "vllm", "only 3.22 of 4.0 GiB are free"),
        ("free-main-memory", "vllm", "only 15.2 of 23.48 GiB are free"),
        ("not-enough-gpus", "vllm", "4 are asked for and 2 are there"),
        ("heads-not-divisible", "vllm", "14 attention heads cannot be divided by 4"),
        ("context-too-long", "vllm", "lower model_max_context to 2048"),
        ("context-too-long", "sglang", "lower model_max_context to 2048"),
        ("unknown-option", "vllm", "--bogus"),
        ("unknown-option", "sglang", "--tp-size"),
        ("unknown-option", "transformers", "check --bogus in model_kwargs"),
        ("missing-dependency", "sglang", "sgl_kernel"),
        ("missing-dependency", "llamacpp", "libcublas.so.12"),
    ],
)
def test_what_the_line_tells_is_in_the_advice(name, engine, said):
    advices = [diagnose([line], e) for n, e, line in LINES if (n, e) == (name, engine)]
    assert any(said in found.advice for found in advices if found is not None)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "INFO:     Application startup complete.",
        "(APIServer pid=1) INFO 11-23 19:24:28 [entry.py:140] Starting vLLM server on http://127.0.0.1:8000",
        # Prompts that are echoed, and what engines say besides.
        "INFO 06-03 12:30:46 [logger.py:43] Received request cmpl-1: prompt: 'What does CUDA out of memory mean?'",
        "(APIServer pid=9) INFO 11-23 [logger.py:43] Received request: prompt: 'OSError: [Errno 28] No space left on'",
        "[2026-11-23 19:12:40] INFO:     Receive: obj=GenerateReqInput(text='Address already in use')",
        '{"prompt": "Tell me about gated communities and World sizes"}',
        "WARNING 11-23 19:24:04 [cpu.py:224] ModuleNotFoundError: No module named 'triton'",
        "(Worker pid=1) WARNING 11-23 19:24:23 [x.py:1] ImportError: cannot import name 'foo'",
        "0.00.020.925 I srv  llama_server: failed to load model draft, going on without",
        "0.00.020.925 W srv  init: CUDA error: none, just a warning",
        "/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be"
        " 2 leaked shared_memory objects to clean up at shutdown",
        ' - leaked function "zeros_1d"',
        "INFO 11-23 [network_utils.py:248] Port 29500 is already in use, trying port 29501",
        "(APIServer pid=1) WARNING 11-23 [parallel.py:746] Address already in use. Retrying with a new port.",
        "I died laughing, failed the exam and killed time",
    ],
)
def test_other_lines_are_nothing(line):
    assert diagnose([line]) is None


def test_a_root_cause_wins_over_what_follows_from_it():
    lines = [
        "(Worker pid=2) ERROR 05-08 14:46:12 [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "(EngineCore pid=1) Exception: WorkerProc initialization failed due to an exception in a background process.",
        "(APIServer pid=0) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
        "{'EngineCore': 1}",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        *[' - leaked function "x"'] * 40,
    ]
    found = diagnose(lines, "vllm")
    assert found is not None
    assert found.name == "gpu-out-of-memory"
    assert found.kind == "resource"


def test_the_last_root_cause_wins():
    tried = "ImportError: libfoo.so: cannot open shared object file: No such file or directory"
    real = "OSError: [Errno 28] No space left on device"
    found = diagnose([tried, real], "vllm")
    assert found is not None
    assert found.name == "disk-full"


def test_gated_wins_over_the_401_that_it_comes_with():
    found = diagnose(
        [
            "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/meta-llama/x",
            "The above exception was the direct cause of the following exception:",
            "Cannot access gated repo for url https://huggingface.co/meta-llama/x/resolve/main/config.json.",
        ],
        "vllm",
    )
    assert found is not None
    assert found.name == "gated-model"


def test_entries_of_other_engines_are_left_out():
    line = "E srv    load_model: failed to load model, 'x'"
    assert diagnose([line], "vllm") is None
    assert diagnose([line], "llamacpp") is not None
    assert diagnose([line], "") is not None


@pytest.mark.parametrize("returncode", [-9, 137])
def test_a_kill_that_nothing_explains_is_told(returncode):
    assert diagnose(["loading"], "vllm", returncode=returncode) == KILLED
    assert diagnose([], "vllm", returncode=1) is None
    explained = diagnose(["RuntimeError: No CUDA GPUs are available"], "vllm", returncode=returncode)
    assert explained is not None
    assert explained.name == "no-gpu"


PORT_LINES = [line for name, _, line in LINES if name == "port-in-use"]


@pytest.mark.parametrize("line", PORT_LINES)
def test_a_taken_port_is_heard_in_live_output(line):
    assert is_port_in_use(line)
    assert is_port_in_use(f"before\r\n{line}\nafter")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Port 29500 is already in use, trying port 29501",
        "WARNING 11-23 [parallel.py:746] Address already in use. Retrying with a new port.",
        "memory in use: 3 GiB",
        "bind mounts: none",
    ],
)
def test_a_port_that_the_engine_changes_by_itself_is_no_news(text):
    assert not is_port_in_use(text)


def test_reading_live_output_is_cheap():
    """At 100 MB/s a chunk of 64 KiB takes 650 us to arrive; looking at it costs less."""
    chunk = "Loading weights:  10%|#    | 1/10 [00:01<00:09, some engine prints a lot]\n" * 900
    best = min(_timed(chunk) for _ in range(20))
    assert best < 0.0005


def _timed(chunk: str) -> float:
    began = time.process_time()
    assert not is_port_in_use(chunk)
    return time.process_time() - began


@given(st.lists(st.text(), max_size=5), st.sampled_from(["", "vllm", "sglang", "llamacpp", "x"]))
def test_any_output_is_read_without_error(lines, engine):
    found = diagnose(lines, engine)
    assert found is None or found.line in lines


@pytest.mark.parametrize("pattern", CATALOGUE, ids=lambda pattern: pattern.name)
def test_no_regex_is_slow_on_a_long_line(pattern):
    for line in ("a" * 4096, "(" * 4096, "died " * 800, "attention heads (" * 240, "/dev/shm " * 450, "max " * 1000):
        began = time.process_time()
        pattern.regex.search(line)
        assert time.process_time() - began < 0.1
