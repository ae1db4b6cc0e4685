"""`InferenceRunner`: the user's rollouts over all documents, exactly once."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trinfer._version import __version__
from trinfer.batch.context import entered
from trinfer.batch.jobs import RolloutJob
from trinfer.batch.options import RunOptions, default_run_dir
from trinfer.batch.pipeline import Limits
from trinfer.batch.policy import ErrorPolicy
from trinfer.batch.publish import Output
from trinfer.batch.run import BatchRun
from trinfer.data.documents import Document
from trinfer.data.readers import Inputs
from trinfer.data.records import InvalidRow, Raw, content_key
from trinfer.data.values import told
from trinfer.data.writers import is_stream
from trinfer.engines.create import create_server
from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

    from trinfer.batch.items import Progress
    from trinfer.batch.jobs import RolloutFunction
    from trinfer.batch.summary import Summary
    from trinfer.config import InferenceConfig
    from trinfer.server.base import InferenceServer

__all__ = ["InferenceRunner"]


class InferenceRunner:
    """Runs a rollout function over documents, through an engine of its own, and keeps what is done through any crash.

    Args:
        rollout_fn: ``async def rollout(document, generate, **context)``. ``await generate(payload)`` sends one request
            and returns an `InferenceResult`; it may be called any number of times. What the function returns (an
            `InferenceResult`, any JSON value, or None) is the rollout's result.
        config: the engine.
        reader: paths of the input (files, globs, folders, remote ones, ``hf:NAME``), `Inputs`, or an iterable of
            documents that gives the same ones each time.
        writer: the output: a file, or a folder of parts (``FOLDER/``), remote ones too.
        rollouts_per_document: how often the function is run for each document, side by side.
        metadata_key: where in a document's metadata the results are put, as a list. A document all of whose results
            are None is left out.
        shared_context: keywords for the function: a dict, a function that returns one, or a context manager around
            one, sync or async. It is entered once for each run.
        max_concurrent_generations: requests under way at once.
        max_concurrent_documents: documents under way at once; by default as many as the former needs.
        durable: keep a run directory, so that a run that was killed is continued by the same call. Without, an
            interrupted run leaves what it has as ``NAME.partial``.
        run_dir: the run directory; by default the output's name with ``.run``.
        on_error: "fail" ends the run with the first document that fails (the next call continues), "skip" notes it in
            the run directory's ``errors.jsonl`` and goes on, "retry" tries again before that. ``max_failures`` as
            "100" or "1%" ends the run when more fail.
        version: part of what a run is; by default a hash of the rollout function's source. A run is not continued with
            another one, unless ``accept_changes``.
        ordered: write the documents in the order of the input.
        text_field: where records of the input have their text.

    The rest is as in `RunOptions`.

    Raises:
        ConfigError: values that are not possible.
    """

    def __init__(
        self,
        rollout_fn: RolloutFunction,
        config: InferenceConfig,
        reader: str | Sequence[str] | Inputs | Iterable[Document],
        writer: str | Path | Output,
        *,
        rollouts_per_document: int = 1,
        metadata_key: str = "rollout_results",
        shared_context: Any = None,  # noqa: ANN401  # see `trinfer.batch.context`
        max_concurrent_generations: int = 500,
        max_concurrent_documents: int | None = None,
        durable: bool = True,
        run_dir: str | Path | None = None,
        on_error: str | ErrorPolicy = "fail",
        max_failures: str | None = None,
        version: str | None = None,
        ordered: bool = False,
        overwrite: bool = False,
        restart: bool = False,
        accept_changes: bool = False,
        retry_failed: bool = False,
        text_field: str = "text",
    ) -> None:
        for name, value in (
            ("rollouts_per_document", rollouts_per_document),
            ("max_concurrent_generations", max_concurrent_generations),
            ("max_concurrent_documents", 1 if max_concurrent_documents is None else max_concurrent_documents),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: allowed are integers >= 1")
        if not callable(rollout_fn):
            raise ConfigError(
                f"rollout_fn={rollout_fn!r}: allowed is an async function (document, generate, **context)"
            )
        kept = {"run_dir": run_dir, "ordered": ordered, "restart": restart}
        kept |= {"accept_changes": accept_changes, "retry_failed": retry_failed}
        for name in [] if durable else [name for name, value in kept.items() if value]:
            raise ConfigError(f"{name} needs a run directory: allowed is one of {name} and durable=False")
        self._function, self._config = rollout_fn, config
        self._inputs = _inputs(reader)
        self._shared = shared_context
        if not isinstance(writer, str | Path | Output):
            raise ConfigError(f"writer={writer!r}: allowed are paths and Output")
        output = writer if isinstance(writer, Output) else Output(str(writer))
        if durable and is_stream(output.path):
            raise ConfigError(
                f"{output.path} is a stream, which a run cannot continue: allowed is durable=False with it"
            )
        _check_params(config.default_generation_params)
        if isinstance(self._inputs, _Documents):
            text_field = "text"  # they have it where documents have it
        code = str(version) if version is not None else _source_hash(rollout_fn)
        self._options = RunOptions(
            output=output,
            run_dir=(Path(run_dir) if run_dir is not None else default_run_dir(output.path)) if durable else None,
            limits=Limits(max_concurrent_generations, max_concurrent_documents, rollouts_per_document),
            policy=ErrorPolicy.of(on_error, max_failures),
            job={
                "model": config.model_name_or_path,
                "engine": config.server_type,
                "use_chat": config.use_chat,
                "params": dict(config.default_generation_params),
                "rollout": code,
                "rollouts_per_document": rollouts_per_document,
                "metadata_key": metadata_key,
                "text_field": text_field,
            },
            notes={"trinfer": __version__},
            ordered=ordered,
            overwrite=overwrite,
            restart=restart,
            accept_changes=accept_changes,
            retry_failed=retry_failed,
        )
        self._job = RolloutJob(
            rollout_fn, rollouts_per_document, metadata_key=metadata_key, text_field=text_field, code=code
        )

    async def run(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        stop: trio.Event | None = None,
        progress: Progress | None = None,
    ) -> Summary:
        """Do one shard of the documents, or what is left of it; returns the figures of this session.

        Args:
            rank, world_size: this shard, of so many. Documents are dealt out by their content, and a run may be
                continued with another number of shards.
            stop: when it is set, no more documents are begun, and those under way are finished.

        Raises:
            ServerError: the engine failed. FileError: a file or the disk did. RunStopped: documents fail, and the
                policy says that this is enough. ConfigError: the run directory belongs to another job.
                RolloutError and other InferenceErrors are the ``__cause__`` of RunStopped.

        Cancelled: requests under way are dropped; what was answered is kept.
        """
        if not _in_trio():
            raise ConfigError(
                "run() is called without trio: allowed are `trio.run(runner.run)` and `runner.run_sync()`",
                cause="asyncio, or another library, runs the program",
            )
        if not (isinstance(rank, int) and isinstance(world_size, int) and 0 <= rank < world_size):
            raise ConfigError(
                f"rank={rank!r} of world_size={world_size!r}: allowed are integers with 0 <= rank < world_size"
            )
        options = replace(self._options, rank=rank, world_size=world_size)
        job = copy.copy(self._job)  # which gets this run's context: ranks may run side by side
        with BatchRun(self._inputs, job, options) as batch:
            if batch.is_finished:
                batch.summary.is_complete = True
                return batch.summary
            await batch.run(lambda: self._server(rank, job), stop=stop, progress=progress)
            return batch.summary

    def run_sync(self, rank: int = 0, world_size: int = 1) -> Summary:
        """`run` for callers without trio. Ctrl-C ends it, and what was answered is kept."""
        if _in_trio():
            raise ConfigError("run_sync() is called within trio: allowed is `await runner.run()`")
        try:
            return trio.run(self.run, rank, world_size, restrict_keyboard_interrupt_to_checkpoints=True)
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            raise KeyboardInterrupt from None  # as a program without nurseries would get it

    @asynccontextmanager
    async def _server(self, rank: int, job: RolloutJob) -> AsyncIterator[InferenceServer | None]:
        async with create_server(self._config, rank) as server:
            if server is None:  # a worker node
                yield None  # type: ignore[unreachable]
                return
            async with entered(self._shared) as context:
                job.context = context
                yield server


def _check_params(params: Mapping[str, Any]) -> None:
    """Refuse parameters that no request could hold, and no manifest. Raises ConfigError."""
    for name, value in params.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"InferenceConfig.default_generation_params[{name!r}] is {value!r}: allowed are JSON values",
                cause=str(error),
            ) from error


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


class _Documents(Inputs):
    """Documents of the caller's own."""

    def __init__(self, documents: Iterable[Document]) -> None:
        super().__init__([])
        try:
            self._documents: Iterable[Document] = documents
            self._can_be_read_again = iter(documents) is not documents
        except TypeError as error:
            raise ConfigError(
                f"the reader is a {type(documents).__name__}: allowed are paths, Inputs and iterables of documents"
            ) from error

    @property
    def is_repeatable(self) -> bool:
        return self._can_be_read_again

    def __iter__(self) -> Iterator[Raw]:
        for number, document in enumerate(self._documents, 1):
            if not isinstance(document, Document):
                raise ConfigError(
                    f"number {number} of the reader is a {type(document).__name__}: allowed are documents, such as "
                    "Document(text=…, id=…)"
                )
            size = len(document.text) if isinstance(document.text, str) else 0
            place = f"document {number}"
            try:
                fields = document.to_dict()
            except Exception as problem:  # anything may stand in its parts
                error = InvalidRow(f"{place}: it is no document: {type(problem).__name__}: {problem}")
                yield Raw(place, size, {"document": [told(each) for each in vars(document).values()]}, error)
                continue
            # A rollout may change its document, but not the caller's: that would be another one when it is read again.
            yield Raw(place, size, _detached(fields))


def _detached(value: Any) -> Any:  # noqa: ANN401  # a value of a document
    """A copy of dicts and lists, all the way down."""
    if type(value) is dict:
        return {name: _detached(each) for name, each in value.items()}
    return [_detached(each) for each in value] if type(value) is list else value


def _inputs(reader: str | Sequence[str] | Inputs | Iterable[Document]) -> Inputs:
    if isinstance(reader, Inputs):
        return reader
    if isinstance(reader, str | Path):
        return Inputs(str(reader))
    if isinstance(reader, list | tuple) and reader and all(isinstance(each, str | Path) for each in reader):
        return Inputs([str(each) for each in reader])
    return _Documents(reader)  # type: ignore[arg-type]  # what is left


def _source_hash(function: RolloutFunction) -> str:
    """A short hash of a function's source, and of what `functools.partial` gives it; its name where there is none."""
    given: list[Any] = []
    while isinstance(function, functools.partial):
        given.append([function.args, function.keywords])
        function = function.func
    try:
        source = inspect.cleandoc(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        source = getattr(function, "__qualname__", type(function).__qualname__)
        if not given:
            return source
    with contextlib.suppress(ValueError, RecursionError):  # of an object that holds itself
        source += content_key({"given": given}).hex() if given else ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
