"""Runs in an engine's own environment: feeds command lines to the engine's own argument parser, starts nothing.

Reads ``{"engine": NAME, "lines": [[word, …], …]}`` from stdin, and writes one JSON list to stdout: for each line the
parsed values as texts, or the parser's error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import warnings


def vllm():
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    top = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand()
    serve.subparser_init(top.add_subparsers(required=True, dest="subparser"))

    def parse(words):
        namespace = top.parse_args(words)
        serve.validate(namespace)
        return vars(namespace)

    return parse


def sglang():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return lambda words: vars(parser.parse_args(words))


def transformers():
    import typer
    from transformers.cli.transformers import app

    group = app if hasattr(app, "commands") else typer.main.get_command(app)  # it changed between versions
    serve = group.commands["serve"]

    def parse(words):
        assert words[0] == "serve"
        with serve.make_context("serve", list(words[1:])) as context:
            return context.params

    return parse


def main():
    asked = json.load(sys.stdin)
    answers = []
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parse = {"vllm": vllm, "sglang": sglang, "transformers": transformers}[asked["engine"]]()
        for words in asked["lines"]:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    answers.append({key: str(value) for key, value in parse(words).items()})
            except SystemExit:
                answers.append(said.getvalue())
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
