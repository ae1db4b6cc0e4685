"""``trinfer run``: the prompts of files through one engine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from trinfer.cli import exit_codes
from trinfer.cli.options import add_engine_options, at_least_one, make_config, pairs, shard
from trinfer.cli.session import Session, add_run_options, prices

if TYPE_CHECKING:
    from trinfer.batch.options import RunOptions
    from trinfer.batch.prompts import Prompts
    from trinfer.data.readers import Inputs

__all__ = ["add_parser", "execute"]

EPILOG = f"""\
input: rows with `messages`, `prompt` or `text` (or --prompt-field, or --template), and an `id` if they have one. JSONL,
CSV, TSV, Parquet, text files (one row each), also .gz and .zst; globs, folders, remote paths (s3://, gs://, hf://, …),
hf:NAME?split=train for data sets of Hugging Face, and - for standard input.
output: the same fields, `id`, and `generation` (text, finish_reason, usage) or `error` (type, message, status), in the
order in which rows are done, or --ordered. JSONL (also .gz, .zst) or Parquet; a folder (FOLDER/) gets parts.

The run is kept in OUTPUT.run: the same command continues it after any crash, and pays for nothing twice.

keys come from the environment: TRINFER_API_KEY, or OPENAI_API_KEY with --engine endpoint.

{exit_codes.TABLE}"""

DRY_ROWS = 3  # requests that --dry-run shows
DRY_SAMPLE = 1000  # rows that its estimate is made of
CHARACTERS_PER_TOKEN = 4.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer run``."""
    parser = commands.add_parser(
        "run",
        help="run the prompts of files",
        description="Runs one generation, or several, for each row of the input.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute, retry_failed=False)
    add = parser.add_argument
    add("input", metavar="INPUT", nargs="+", help="files, globs, folders, or - for standard input")
    add("-o", "--output", required=True, help="a file, a folder (FOLDER/), or - for standard output")
    add("--input-format", choices=("jsonl", "csv", "tsv", "text", "parquet", "hf"), help="where names do not tell")
    add("--output-format", choices=("jsonl", "jsonl.gz", "jsonl.zst", "parquet"), help="of the parts in a folder")
    add("--limit", type=at_least_one, metavar="N", help="only the first N rows")
    add("--shuffle", type=int, metavar="SEED", help="rows in another order, drawn from 10,000 at a time")
    add(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="RANK/COUNT",
        help="only this share of the rows, such as $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT; OUTPUT is a folder",
    )
    add("--dry-run", action="store_true", help="show the first requests and an estimate of tokens, and start nothing")
    add_run_options(parser)
    add_engine_options(parser)

    add = parser.add_argument_group("requests").add_argument
    add("--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat route (default)")
    add("--prompt-field", metavar="NAME", help="field of the row that holds the prompt")
    add("--template", metavar="FILE", help="jinja2 template that makes the prompt out of the row's fields")
    add("--system-prompt", metavar="TEXT", help="for rows without a system message")
    add("--image-field", metavar="NAME", help="field with images: data URLs, http URLs or paths")
    add("--image-folder", metavar="FOLDER", default=".", help="where the paths begin (default: the current folder)")
    add("--rollouts", type=at_least_one, default=1, metavar="N", help="generations for each row (default: %(default)s)")
    add(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="generation parameter, such as max_tokens=100"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        TrinferError: what `trinfer.cli.main` turns into a message.
    """
    from trinfer.batch.jobs import GenerationJob
    from trinfer.batch.prompts import PromptOptions, Prompts, read_template
    from trinfer.batch.run import BatchRun
    from trinfer.data.readers import Inputs
    from trinfer.errors import ConfigError

    params = pairs("--param", arguments.param)
    for name in ("messages", "prompt", "stream"):
        if name in params:
            raise ConfigError(f"--param {name} is set by trinfer: allowed are generation parameters")
    config = make_config(arguments, use_chat=arguments.chat)
    options = PromptOptions(
        arguments.chat,
        arguments.prompt_field,
        arguments.system_prompt,
        None if arguments.template is None else read_template(arguments.template),
        arguments.image_field,
        arguments.image_folder,
    )
    prompts = Prompts(options)
    inputs = Inputs(arguments.input, format=arguments.input_format, limit=arguments.limit, shuffle=arguments.shuffle)
    if arguments.dry_run:
        return _dry_run(inputs, prompts, params, arguments)
    job = {
        "model": config.model_name_or_path or config.endpoint_url or "",
        "engine": config.server_type,
        "use_chat": options.use_chat,
        "params": params,
        "prompt_field": options.prompt_field,
        "system_prompt": options.system_prompt,
        "template": options.template,
        "image_field": options.image_field,
        "rollouts": arguments.rollouts,
    }
    with BatchRun(inputs, GenerationJob(prompts, arguments.rollouts), run_options(arguments, params, job)) as batch:
        if batch.is_finished:
            return tell_finished(batch.directory, arguments)
        return Session(arguments, config, batch, inputs.total_bytes).execute()


def run_options(arguments: argparse.Namespace, params: dict[str, Any], job: dict[str, Any]) -> RunOptions:
    """What the options of a run say. Raises ConfigError."""
    from pathlib import Path

    from trinfer._version import __version__
    from trinfer.batch.options import RunOptions, default_run_dir
    from trinfer.batch.pipeline import Limits
    from trinfer.batch.policy import ErrorPolicy
    from trinfer.batch.publish import Output
    from trinfer.cli.descriptors import affordable
    from trinfer.data.writers import is_stream
    from trinfer.errors import ConfigError
    from trinfer.observe.progress import say

    output = "-" if arguments.output == "/dev/stdout" else arguments.output
    durable = arguments.durable
    if is_stream(output):
        if durable or arguments.run_dir:
            raise ConfigError(f"{output} is a stream, which a run cannot continue: allowed is --no-durable with it")
        durable = False
    run_dir = None
    if durable is not False:
        run_dir = Path(arguments.run_dir) if arguments.run_dir else default_run_dir(output)
    else:
        for name in ("ordered", "run_dir", "restart", "accept_changes", "repair"):
            if getattr(arguments, name):
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} needs a run directory: allowed is one of {option} and --no-durable")
    rank, world_size = getattr(arguments, "shard", (0, 1))
    # The embedded engine has the other ends of all connections.
    requests = affordable(arguments.max_concurrent, each=2 if arguments.engine == "dummy" else 1)
    if requests < arguments.max_concurrent and not arguments.quiet:
        say(f"at most {requests} requests at once: this system allows no more open files (ulimit -Hn)")
    return RunOptions(
        output=Output(output, suffix=getattr(arguments, "output_format", None) or "jsonl"),
        run_dir=run_dir,
        limits=Limits(requests, rollouts=getattr(arguments, "rollouts", 1)),
        policy=ErrorPolicy.of(arguments.on_error, arguments.max_failures),
        params=params,
        job=job,
        notes={"trinfer": __version__, "command": arguments.argv},
        rank=rank,
        world_size=world_size,
        ordered=arguments.ordered,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        accept_changes=arguments.accept_changes,
        repair=arguments.repair,
        retry_failed=arguments.retry_failed,
        prices=prices(arguments),
    )


def tell_finished(directory: Any, arguments: argparse.Namespace) -> int:  # noqa: ANN401  # a RunDirectory
    """Say that there is nothing left to do; returns the exit code of the run."""
    from trinfer.observe.progress import say

    mark = directory.finished()
    if not arguments.quiet:
        failed = f", {mark['failed']} rows failed: `trinfer retry {directory.path}`" if mark["failed"] else ""
        say(f"this run is finished: {mark['rows']} rows in {arguments.output}{failed}; --restart begins it anew")
    return exit_codes.ROWS_FAILED if mark["failed"] else exit_codes.OK


def _dry_run(inputs: Inputs, prompts: Prompts, params: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Show what would be asked, and how much it may be."""
    import json

    from trinfer.data.records import InvalidRow
    from trinfer.observe.progress import say

    characters = rows = invalid = read = 0
    for raw in inputs:
        if rows >= DRY_SAMPLE:
            break
        rows += 1
        read += raw.size
        try:
            payload = {**params, **prompts.payload(raw.fields(), raw.place)}
            shown = json.dumps(payload, indent=1, ensure_ascii=True) if rows <= DRY_ROWS else ""
            texts = _texts(payload.get("messages", payload.get("prompt")))
        except (InvalidRow, RecursionError) as error:
            invalid += 1
            say(str(error) if isinstance(error, InvalidRow) else f"{raw.place}: the row is nested too deeply")
            continue
        if shown:
            sys.stdout.write(shown + "\n")
        characters += sum(map(len, texts))
    total, about = rows, ""
    if inputs.total_bytes and read and rows >= DRY_SAMPLE:
        total, about = round(rows * inputs.total_bytes / read), "about "
    each = characters / CHARACTERS_PER_TOKEN / max(1, rows - invalid)
    longest = params.get("max_tokens", params.get("max_completion_tokens"))
    generated = (
        f"at most {total * arguments.rollouts * longest:,} generated"
        if isinstance(longest, int)
        else "generated: without max_tokens, as many as the model likes"
    )
    say(
        f"{about}{total:,} rows, {invalid} of the first {rows:,} not valid; prompt tokens: about "
        f"{round(total * arguments.rollouts * each):,} ({each:.0f} for each request, {CHARACTERS_PER_TOKEN:g} "
        f"characters for a token); {generated}"
    )
    return exit_codes.ROWS_FAILED if invalid else exit_codes.OK


def _texts(value: Any) -> list[str]:  # noqa: ANN401  # a JSON value
    """Every text in messages; images, which are data URLs, are not counted."""
    if isinstance(value, str):
        return [] if value.startswith("data:") else [value]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    if isinstance(value, dict):
        return [text for name, each in value.items() if name not in {"role", "type"} for text in _texts(each)]
    return []
