"""``trinfer batch``: the file format of OpenAI's batch API, as ``vllm run-batch`` takes it, with resume."""

from __future__ import annotations

import argparse

from trinfer.cli import exit_codes
from trinfer.cli.options import add_engine_options, make_config
from trinfer.cli.run import run_options, tell_finished
from trinfer.cli.session import Session, add_run_options

__all__ = ["add_parser", "execute"]

EPILOG = f"""\
input: lines with custom_id, method (POST), url and body, as for the Batch API of OpenAI; the urls are
/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/rerank, /v1/score and /v1/responses.
output: lines with id, custom_id, response (status_code, request_id, body) and error, in the order in which they are
done, or --ordered. Requests that fail have their error in the same file, and in OUTPUT.run/errors.jsonl.

The run is kept in OUTPUT.run: the same command continues it after any crash, and pays for nothing twice.

keys come from the environment: TRINFER_API_KEY, or OPENAI_API_KEY with --engine endpoint.

{exit_codes.TABLE}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer batch``."""
    parser = commands.add_parser(
        "batch",
        help="run a file in the format of OpenAI's batch API",
        description="Runs the requests of a batch file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute, retry_failed=False)
    add = parser.add_argument
    add("-i", "--input-file", required=True, metavar="FILE", help="a file, local or remote, or - for standard input")
    add("-o", "--output-file", dest="output", required=True, metavar="FILE", help="a file, local or remote")
    add_run_options(parser)
    add_engine_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        TrinferError: what `trinfer.cli.main` turns into a message.
    """
    from trinfer.batch.openai_format import BatchFileJob, Routed
    from trinfer.batch.run import BatchRun
    from trinfer.data.readers import Inputs

    config = make_config(arguments)
    inputs = Inputs(arguments.input_file, format="jsonl")
    job = {
        "format": "openai batch",
        "model": config.model_name_or_path or config.endpoint_url or "",
        "engine": config.server_type,
    }
    with BatchRun(inputs, BatchFileJob(config.model), run_options(arguments, {}, job)) as batch:
        if batch.is_finished:
            return tell_finished(batch.directory, arguments)
        return Session(arguments, config, batch, inputs.total_bytes, adapt=Routed).execute()
