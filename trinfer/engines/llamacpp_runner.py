"""A command line for llama.cpp's own HTTP server as the Python package xllamacpp carries it.

Stands alone: it is executed by path, and takes those options of ``llama-server`` that are needed here; others are
taken for fields of ``xllamacpp.CommonParams``. SIGTERM and SIGINT end it at once, also while it loads: there is nothing
to save, and the library's own teardown can take seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

# llama-server's name of an option -> the field of CommonParams that holds it
FIELDS = {
    "batch-size": "n_batch",
    "cache-reuse": "n_cache_reuse",
    "cont-batching": "cont_batching",
    "ctx-size": "n_ctx",
    "embeddings": "embedding",
    "gpu-layers": "n_gpu_layers",
    "jinja": "use_jinja",
    "metrics": "endpoint_metrics",
    "n-predict": "n_predict",
    "parallel": "n_parallel",
    "predict": "n_predict",
    "slots": "endpoint_slots",
    "threads-http": "n_threads_http",
    "timeout": "timeout_read",
    "ubatch-size": "n_ubatch",
}


def parser() -> argparse.ArgumentParser:
    """The options that are not simply fields."""
    made = argparse.ArgumentParser(prog="llamacpp_runner", allow_abbrev=False)
    model = made.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", default="")
    model.add_argument("--hf-repo", help="a name on the hub: refused, since the package downloads nothing")
    made.add_argument("--alias", required=True)
    made.add_argument("--host", required=True)
    made.add_argument("--port", required=True, type=int)
    made.add_argument("--ctx-size", type=int, default=0)
    made.add_argument("--parallel", type=int, default=1)
    made.add_argument("--threads", type=int, default=0)
    return made


def joined(words: list[str]) -> list[str]:
    """``--name value``, as llama-server wants it, in one word: ``--name=value``."""
    made: list[str] = []
    for word in words:
        if made and made[-1].startswith("--") and "=" not in made[-1] and not word.startswith("--"):
            made[-1] += f"={word}"
        else:
            made.append(word)
    return made


def set_field(params: Any, word: str) -> None:  # noqa: ANN401  # xllamacpp has no types
    """Apply ``--name``, ``--no-name`` or ``--name=value``.

    Raises:
        ValueError: no such field, or not of its type.
    """
    name, equals, text = word.removeprefix("--").partition("=")
    is_negated = not equals and name.startswith("no-")
    name = name.removeprefix("no-") if is_negated else name
    field = FIELDS.get(name, name.replace("-", "_"))
    present = getattr(params, field, None)
    if not word.startswith("--") or not isinstance(present, bool | int | float | str):
        raise ValueError(f"unrecognized arguments: {word}")
    if isinstance(present, bool):
        if equals and text not in {"0", "1", "on", "off"}:
            raise ValueError(f"error: invalid argument: {word}")
        setattr(params, field, text in {"1", "on"} if equals else not is_negated)
        return
    try:
        setattr(params, field, type(present)(text))
    except ValueError:
        raise ValueError(f"error: invalid argument: {word}") from None


def main() -> int:
    """Load the model, and serve until a signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    known, rest = parser().parse_known_args()
    if not os.path.isfile(known.model):
        hint = ", and only llama-server can download models" if known.hf_repo else ""
        print(f"failed to load model, '{known.hf_repo or known.model}': there is no such file{hint}", file=sys.stderr)
        return 1

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = known.model
    params.model_alias = {known.alias}
    params.hostnames = [known.host]
    params.port = known.port
    params.n_ctx = known.ctx_size
    params.n_parallel = known.parallel
    if known.threads > 0:
        params.cpuparams.n_threads = known.threads
    key = os.environ.pop("LLAMA_API_KEY", "")
    if key:
        params.api_keys = [key]
    try:
        for word in joined(rest):
            set_field(params, word)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
