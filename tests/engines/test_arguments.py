"""`trinfer.engines.arguments`: the rule, and what is refused."""

from __future__ import annotations

import argparse
import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trinfer.engines.arguments import chosen_names, option_name, options
from trinfer.errors import ConfigError

RESERVED = {"port": "transport", "model": "model_name_or_path", "tensor-parallel-size": "tp", "c": "model_max_context"}

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,12}(\.[A-Za-z0-9_-]{1,5}){0,2}", fullmatch=True)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(), plain, max_size=3)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"max-num-seqs": 4, "dtype": "float32"}, ["--max-num-seqs=4", "--dtype=float32"]),
        ({"seed": None, "block_size": 0}, ["--block-size=0"]),
        ({"gpu_memory_utilization": 0.9}, ["--gpu-memory-utilization=0.9"]),
        ({"hf_overrides": {"a": [1, None]}}, ['--hf-overrides={"a": [1, null]}']),
        ({"lora_modules": ("a=b", "c=d")}, ['--lora-modules=["a=b", "c=d"]']),
        ({"compilation_config.max_capture_size": 8}, ["--compilation-config.max_capture_size=8"]),
        ({"chat_template": ""}, ["--chat-template="]),
        ({"note": "-x y\n'z'"}, ["--note=-x y\n'z'"]),
        ({}, []),
    ],
)
def test_the_rule(kwargs, expected):
    assert options(kwargs, reserved=RESERVED) == expected


@pytest.mark.parametrize("key", ["port", "model", "tensor_parallel_size", "tensor-parallel-size", "c", "model.x"])
def test_what_trinfer_sets_is_refused_with_the_field_to_use(key):
    with pytest.raises(ConfigError) as caught:
        options({key: 1}, reserved=RESERVED)
    assert key in caught.value.message
    assert RESERVED[option_name(key).partition(".")[0]] in str(caught.value.advice)


def test_beginnings_of_reserved_names_are_refused_where_the_parser_completes_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-parallel-size", type=int)
    assert parser.parse_args(["--tensor-par=3"]).tensor_parallel_size == 3  # the trap
    with pytest.raises(ConfigError, match="short for 'tensor-parallel-size'"):
        options({"tensor_par": 3}, reserved=RESERVED, abbreviates=True)
    assert options({"tensor_par": 3}, reserved=RESERVED) == ["--tensor-par=3"]


def test_one_option_in_two_spellings_is_refused():
    with pytest.raises(ConfigError, match="both 'max_len' and 'max-len'"):
        options({"max_len": 1, "max-len": 2}, reserved={})


@pytest.mark.parametrize("key", ["", "-x", "--x", "a b", "1a", "a=b", "a..b", "a.", "ä", "a\n", "a;b", "_x"])
def test_bad_keys_are_refused(key):
    with pytest.raises(ConfigError, match="allowed is an option name"):
        options({key: 1}, reserved={})


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", "a\0b", "\ud800", [object()], {"a": math.nan}, 1j])
def test_values_that_cannot_be_written_are_refused(value):
    with pytest.raises(ConfigError, match="model_kwargs\\['k'\\]"):
        options({"k": value}, reserved={})


def test_a_program_of_the_users_own_gets_its_names_as_they_are_written():
    assert options({"max_len": 1, "a-b": True}, reserved={}, verbatim=True) == ["--max_len=1", "--a-b"]


def test_chosen_names_leave_out_what_is_none():
    assert chosen_names({"log_level": None, "max_len": 0}) == {"max-len"}


@given(st.dictionaries(names, values, max_size=5))
def test_every_value_comes_back_out_of_the_command_line(kwargs):
    """One word per value that is not None, in order, from which name and value can be read back; or ConfigError."""
    before = dict(kwargs)
    try:
        words = options(kwargs, reserved={})
    except ConfigError:
        return
    assert kwargs == before
    given_kwargs = {key: value for key, value in kwargs.items() if value is not None}
    assert len(words) == len(given_kwargs)
    for word, (key, value) in zip(words, given_kwargs.items(), strict=True):
        name = option_name(key)
        assert "\0" not in word
        if value is True:
            assert word == f"--{name}"
        elif value is False:
            assert word == f"--no-{name}"
        else:
            start, text = word.split("=", 1)
            assert start == f"--{name}"
            assert text == (json.dumps(value) if isinstance(value, list | dict) else str(value))


@given(names, st.sampled_from(sorted(RESERVED)))
def test_no_spelling_of_a_reserved_option_gets_through(suffix, reserved):
    spelled = reserved.replace("-", "_")
    for key in (reserved, spelled, f"{spelled}.{suffix}"):
        with pytest.raises(ConfigError):
            options({key: 1}, reserved=RESERVED)


@given(names)
def test_with_abbreviations_argparse_never_takes_an_option_for_a_reserved_one(name):
    assume("." not in name)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tensor-parallel-size")
    parser.add_argument("--port")
    reserved = {"tensor-parallel-size": "tp", "port": "transport"}
    try:
        words = options({name: 1}, reserved=reserved, abbreviates=True)
    except ConfigError:
        return
    parsed, rest = parser.parse_known_args(words)
    assert (parsed.port, parsed.tensor_parallel_size, rest) == (None, None, words)
