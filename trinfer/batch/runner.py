"""`InferenceRunner`: the user's rollouts over all documents, exactly once."""

from __future__ import annotations

import hashlib
import inspect
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trinfer._version import __version__
from trinfer.batch.context import entered
from trinfer.batch.jobs import RolloutJob
from trinfer.batch.pipeline import Limits
from trinfer.batch.policy import ErrorPolicy
from trinfer.batch.publish import Output
from trinfer.batch.run import BatchRun, RunOptions, default_run_dir
from trinfer.data.readers import Inputs
from trinfer.data.records import Raw
from trinfer.engines.create import create_server
from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from trinfer.batch.items import Progress
    from trinfer.batch.jobs import RolloutFunction
    from trinfer.batch.summary import Summary
    from trinfer.config import InferenceConfig
    from trinfer.data.documents import Document
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
            if value < 1:
                raise ConfigError(f"{name}={value}: allowed are integers >= 1")
        if not callable(rollout_fn):
            raise ConfigError(
                f"rollout_fn={rollout_fn!r}: allowed is an async function (document, generate, **context)"
            )
        self._function, self._config = rollout_fn, config
        self._inputs = _inputs(reader)
        self._shared = shared_context
        output = writer if isinstance(writer, Output) else Output(str(writer))
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
                "rollout": version if version is not None else _source_hash(rollout_fn),
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
        self._job = RolloutJob(rollout_fn, rollouts_per_document, metadata_key=metadata_key, text_field=text_field)

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
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} of world_size={world_size}: allowed is 0 <= rank < world_size")
        options = replace(self._options, rank=rank, world_size=world_size)
        with BatchRun(self._inputs, self._job, options) as batch:
            if batch.is_finished:
                batch.summary.is_complete = True
                return batch.summary
            await batch.run(lambda: self._server(rank), stop=stop, progress=progress)
            return batch.summary

    def run_sync(self, rank: int = 0, world_size: int = 1) -> Summary:
        """`run` for callers without trio. Ctrl-C ends it, and what was answered is kept."""
        return trio.run(self.run, rank, world_size, restrict_keyboard_interrupt_to_checkpoints=True)

    @asynccontextmanager
    async def _server(self, rank: int) -> AsyncIterator[InferenceServer | None]:
        async with create_server(self._config, rank) as server:
            if server is None:  # a worker node
                yield None  # type: ignore[unreachable]
                return
            async with entered(self._shared) as context:
                self._job.context = context
                yield server


class _Documents(Inputs):
    """Documents of the caller's own."""

    def __init__(self, documents: Iterable[Document]) -> None:
        super().__init__([])
        self._documents = documents

    def __iter__(self) -> Iterator[Raw]:
        for number, document in enumerate(self._documents, 1):
            yield Raw(f"document {number}", len(document.text), document.to_dict())


def _inputs(reader: str | Sequence[str] | Inputs | Iterable[Document]) -> Inputs:
    if isinstance(reader, Inputs):
        return reader
    if isinstance(reader, str | Path):
        return Inputs(str(reader))
    if isinstance(reader, list | tuple) and reader and all(isinstance(each, str | Path) for each in reader):
        return Inputs([str(each) for each in reader])
    return _Documents(reader)  # type: ignore[arg-type]  # what is left


def _source_hash(function: RolloutFunction) -> str:
    """A short hash of a function's source; its name where there is none."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return getattr(function, "__qualname__", type(function).__qualname__)
    return hashlib.sha256(inspect.cleandoc(source).encode()).hexdigest()[:16]
