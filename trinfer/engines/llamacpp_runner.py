"""A command line for llama.cpp's own HTTP server as the Python package xllamacpp carries it.

Stands alone: it is executed by path, and takes the options of ``llama-server`` that are needed here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys


def main() -> int:
    """Load the model, serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="llamacpp_runner")
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    arguments = parser.parse_args()
    # Blocked before any thread is made, so that only sigwait below hears them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    if not os.path.isfile(arguments.model):
        print(f"failed to load model, '{arguments.model}': there is no such file", file=sys.stderr)
        return 1

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.model_alias = {arguments.alias}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.n_ctx = arguments.ctx_size * arguments.parallel
    params.n_parallel = arguments.parallel
    params.n_gpu_layers = arguments.n_gpu_layers
    # More threads than cores that are really free make tiny models slower by orders of magnitude (spinning).
    params.cpuparams.n_threads = arguments.threads or max(1, (os.cpu_count() or 2) // 2)
    key = os.environ.pop("LLAMA_API_KEY", "")
    if key:
        params.api_keys = [key]
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    print("stopping", flush=True)
    # The library's own teardown can take seconds, and there is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
