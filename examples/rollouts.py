"""Rollouts of two turns over documents, through the dummy engine, with what a second call of the same run costs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from trinfer import Document, Generate, InferenceConfig, InferenceRunner


async def summarise(document: Document, generate: Generate, *, language: str) -> dict[str, Any] | None:
    """Ask for a summary, and for a better one; None leaves a document out."""
    if not document.text.strip():
        return None
    messages = [{"role": "user", "content": f"Summarise in {language}:\n{document.text}"}]
    first = await generate({"messages": messages, "max_tokens": 30})
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Shorter, please."}]
    second = await generate({"messages": messages, "max_tokens": 10})
    return {"draft": first.text, "summary": second.text, "tokens": second.completion_tokens}


def main(folder: Path) -> None:
    documents = [Document(text=f"What there is to say about {n}." if n else " ", id=f"d{n}") for n in range(20)]
    runner = InferenceRunner(
        summarise,
        InferenceConfig("dummy", "dummy", default_generation_params={"temperature": 0.5}),
        reader=documents,  # or "documents/*.parquet", "hf:NAME", …
        writer=folder / "summaries.jsonl",  # its run directory, summaries.jsonl.run, makes the second call free
        rollouts_per_document=2,
        metadata_key="summaries",
        shared_context={"language": "English"},
        on_error="skip",
    )
    summary = runner.run_sync()
    print(f"{summary.ok} documents, {summary.removed} left out, {summary.requests} requests")
    print(f"again: {runner.run_sync().requests} requests")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
