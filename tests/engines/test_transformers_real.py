"""A real ``transformers serve`` (see `install_engines.sh`) on a tiny model."""

from __future__ import annotations

import pytest

from tests.engines import real
from trinfer import InferenceConfig, InferenceResult, ServerError, ServerState, TransformersServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def config(tmp_path):
    return {
        "model_name_or_path": str(tmp_path / "tiny"),
        "executable": str(real.python_of("transformers").with_name("transformers")),
        # The folder does not exist yet: the server would answer 500 for ever.
        "env": {**real.environ(), "HF_HOME": str(tmp_path / "hub-home")},
        "model_kwargs": {"device": "cpu"},
        "default_generation_params": {"max_tokens": 8, "temperature": 0},
        "request_timeout": 120,
        "server_ready_max_attempts": 120,
        "server_ready_delay_sec": 1,
        "server_start_max_retries": 0,
        "shutdown_grace_sec": 10,
    }


async def test_transformers_serves_and_leaves_nothing(config, tmp_path):
    real.make_hugging_face_model("transformers", tmp_path / "tiny")
    async with TransformersServer(InferenceConfig("transformers", **config)) as server:
        chat = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        assert server.port is not None
    assert server.state is ServerState.STOPPED
    assert InferenceResult.from_response(chat).completion_tokens >= 1


def break_nothing(model):
    """There is no such folder."""


def break_weights(model):
    real.make_hugging_face_model("transformers", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("break_it", "cause"), [(break_nothing, "no such model"), (break_weights, "incomplete or corrupt")]
)
async def test_a_wrong_model_is_an_error_of_the_start(config, tmp_path, break_it, cause):
    break_it(tmp_path / "tiny")
    async with TransformersServer(InferenceConfig("transformers", **config)) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    if cause == "no such model":  # told before anything is started
        assert "does not exist on this machine" in caught.value.message
        assert caught.value.log_tail == ()
    else:
        assert caught.value.returncode == 1
        assert cause in str(caught.value.cause)
