"""Each value is checked at construction, and the message names field, value and allowed range."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer import ConfigError, InferenceConfig, TrinferError


def test_defaults_are_those_of_the_reference():
    config = InferenceConfig("dummy")
    assert config.model_max_context == 8192
    assert config.use_chat is True
    assert (config.tp, config.dp, config.pp) == (1, 1, 1)
    assert config.master_port == 9810
    assert config.server_start_timeout_sec == 60
    assert config.server_start_max_retries == 1
    assert config.trust_remote_code is False
    assert config.host == "127.0.0.1"
    assert config.ready_deadline_sec == config.server_ready_max_attempts * config.server_ready_delay_sec


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("server_type", "vlm", "one of 'vllm', 'sglang'"),
        ("transport", "http", "one of 'auto', 'tcp', 'uds'"),
        ("tp", 0, "an integer >= 1"),
        ("tp", 1.5, "an integer >= 1"),
        ("dp", True, "an integer >= 1"),
        ("pp", "2", "an integer >= 1"),
        ("model_max_context", -1, "an integer >= 1"),
        ("master_port", 70000, "an integer from 1 to 65535"),
        ("server_start_max_retries", -1, "an integer >= 0"),
        ("server_ready_max_attempts", 0, "an integer >= 1"),
        ("server_log_max_bytes", 10, "an integer >= 4096"),
        ("request_timeout", 0, "a finite number of seconds > 0"),
        ("request_timeout", float("inf"), "a finite number of seconds > 0"),
        ("request_timeout", "10", "a finite number of seconds > 0"),
        ("server_ready_delay_sec", float("nan"), "a finite number of seconds > 0"),
        ("server_start_timeout_sec", -5, "a finite number of seconds > 0"),
        ("shutdown_grace_sec", -1, "a finite number of seconds >= 0"),
        ("use_chat", "yes", "True or False"),
        ("trust_remote_code", 1, "True or False"),
        ("multi_node", 2, "True, False or None"),
        ("model_name_or_path", "a\nb", "without control characters"),
        ("model_name_or_path", None, "without control characters"),
        ("host", "", "a host name or an address"),
        ("api_key", "a\r\nX-Evil: 1", "without control characters"),
        ("api_key", "", "a non-empty text"),
        ("served_model_name", "", "a non-empty text"),
        ("server_log_folder", 5, "a path"),
        ("model_kwargs", [1], "a mapping with text keys"),
        ("model_kwargs", {1: 2}, "a mapping with text keys"),
        ("default_generation_params", "x", "a mapping with text keys"),
        ("gpus", 0, "a sequence of GPU indexes"),
        ("gpus", "0,1", "a sequence of GPU indexes"),
        ("gpus", (0, 0), "a sequence of GPU indexes"),
        ("gpus", (-1,), "a sequence of GPU indexes"),
        ("gpus", ("a,b",), "a sequence of GPU indexes"),
        ("endpoint_url", "http://x", "None with server_type 'dummy'"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        InferenceConfig(**{"server_type": "dummy", field: value})
    message = str(caught.value)
    assert f"InferenceConfig.{field} is" in message
    assert allowed in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TrinferError)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp", "transformers"])
def test_engines_that_load_a_model_need_its_name(engine):
    with pytest.raises(ConfigError, match=f"{engine} cannot do without"):
        InferenceConfig(engine)
    assert InferenceConfig(engine, "org/model").model == "org/model"
    assert InferenceConfig(engine, "org/model", served_model_name="m").model == "m"


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "ftp://x", "http://", "http://x:99999", "http://x/v1?key=1", "http://x/#y", None, "http://[::1/v1"),
        *("http://[x]:1", "http://x:0", "http://a b/v1", "http://a..b/v1", "http://" + "a" * 70),
    ],
)
def test_endpoints_need_a_url(url):
    with pytest.raises(ConfigError, match="endpoint_url"):
        InferenceConfig("endpoint", endpoint_url=url)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions/", "/v1/embeddings", "/proxy/v1/models"])
def test_an_endpoint_is_given_without_the_route(route):
    with pytest.raises(ConfigError, match="the URL without the route"):
        InferenceConfig("endpoint", endpoint_url=f"http://x{route}")


@pytest.mark.parametrize("host", ["", "127.0.0.1:8000", "[::1]", "::x", "a b", "http://x", "x/y", "u@x"])
def test_a_host_is_a_name_or_an_address_and_no_more(host):
    with pytest.raises(ConfigError, match=r"host is .* a host name or an address without port"):
        InferenceConfig("dummy", host=host)


@pytest.mark.parametrize("host", ["::1", "::", "0.0.0.0", "localhost", "fe80::1%eth0", "a-b.example"])
def test_hosts(host):
    assert InferenceConfig("dummy", host=host).host == host


@pytest.mark.parametrize(
    "url",
    [
        *("https://user:s3cret@host/v1", "https://user:s3cret@host:99999", "ftp://s3cret@host", "user:s3cret@host"),
        *("https://user:s3cret@[::1/v1", "https://a:s3cret/x@y z", "https://host/v1?key=s3cret"),
    ],
)
def test_a_key_in_the_url_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError) as caught:
        InferenceConfig("endpoint", endpoint_url=url)
    assert "s3cret" not in str(caught.value)


def test_custom_servers_need_something_to_run():
    with pytest.raises(ConfigError, match="server_script or server_command"):
        InferenceConfig("custom")


@pytest.mark.parametrize("key", ["", "-x", "--x", "a b", "a=b", "1x", "a\n"])
def test_option_names_are_checked(key):
    with pytest.raises(ConfigError, match="model_kwargs has the key"):
        InferenceConfig("dummy", model_kwargs={key: 1})


def test_environment_names_and_values_are_checked_and_hidden():
    with pytest.raises(ConfigError, match="has the name 'A-B'"):
        InferenceConfig("dummy", env={"A-B": "1"})
    with pytest.raises(ConfigError) as caught:
        InferenceConfig("dummy", env={"TOKEN": b"s3cret"})
    assert "s3cret" not in str(caught.value)


def test_secrets_are_in_no_representation():
    config = InferenceConfig("dummy", api_key="s3cret", env={"TOKEN": "s3cret"})
    assert "s3cret" not in repr(config)
    assert "s3cret" not in json.dumps(config.describe(), default=str)
    with pytest.raises(ConfigError) as caught:
        InferenceConfig("dummy", api_key="s3cret\n")
    assert "s3cret" not in str(caught.value)


def test_a_config_cannot_be_changed():
    nested = {"a": [1]}
    config = InferenceConfig("dummy", model_kwargs=nested, gpus=[0, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tp = 2
    for change in (
        lambda: config.model_kwargs.update(a=2),
        lambda: config.model_kwargs.__setitem__("a", 2),
        lambda: config.model_kwargs.__delitem__("a"),
        lambda: config.model_kwargs.pop("a"),
        lambda: config.model_kwargs.setdefault("b", 1),
        lambda: config.model_kwargs.clear(),
        lambda: config.model_kwargs.popitem(),
        lambda: config.env.__ior__({"A": "1"}),
    ):
        with pytest.raises(TypeError, match="immutable"):
            change()
    nested["a"].append(2)  # the user's own dict is not the config's
    assert config.model_kwargs == {"a": [1]}
    assert config.gpus == (0, 1)


def test_copies_travel_between_processes():
    config = InferenceConfig(
        "vllm", "m", model_kwargs={"a": {"b": 1}}, api_key="k", env={"A": "1"}, server_log_folder=Path("/x")
    )
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert other == config
        assert other.api_key == "k"
        with pytest.raises(TypeError):
            other.model_kwargs["a"] = 1
    assert dataclasses.replace(config, tp=4).tp == 4
    with pytest.raises(ConfigError):
        dataclasses.replace(config, tp=0)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True), JSON))
def test_any_sensible_options_are_kept_as_given(kwargs):
    assert InferenceConfig("dummy", model_kwargs=kwargs).model_kwargs == kwargs


@given(st.sampled_from([field.name for field in dataclasses.fields(InferenceConfig)]), JSON | st.floats() | st.binary())
def test_no_value_at_all_gives_anything_but_a_config_or_a_config_error(field, value):
    message = field
    try:
        InferenceConfig(**{"server_type": "dummy", field: value})
    except ConfigError as error:
        message = str(error)
    assert field in message


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(InferenceConfig)])
def test_whatever_a_field_is_given_there_is_no_error_but_a_config_error(name):
    strange = [
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x",
        "a\nb",
        "\ud800",
        b"x",
        [],
        (1,),
        {},
    ]
    strange += [{1: 2}, {"a": object()}, {"a": iter([])}, {"a": (each for each in "x")}, object(), len, {1, 2}]
    for value in strange:
        with contextlib.suppress(ConfigError):
            config = InferenceConfig(**{"server_type": "dummy", name: value})
            assert config.ready_deadline_sec < float("inf")
