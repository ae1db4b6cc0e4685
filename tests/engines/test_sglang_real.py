"""As far as SGLang goes without a GPU: the real program, started by SGLangServer, and its failure explained."""

from __future__ import annotations

import pytest

from tests.engines import real
from trinfer import InferenceConfig, ServerError, SGLangServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def model(tmp_path):
    return real.make_hugging_face_model("vllm", tmp_path / "tiny")


@pytest.fixture
def python():
    return str(real.python_of("sglang"))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "install "),  # its kernels, or what needs them
        ({"no_such_option": 1}, "check --no-such-option=1 in model_kwargs"),
    ],
)
async def test_a_start_that_fails_is_explained(model, python, kwargs, said):
    config = InferenceConfig(
        "sglang",
        str(model),
        model_max_context=512,
        api_key="sk-sglang-secret",
        executable=python,
        env={**real.environ(), "CUDA_VISIBLE_DEVICES": ""},
        model_kwargs={"device": "cpu", **kwargs},
        server_ready_max_attempts=120,
        server_ready_delay_sec=1,
        server_start_max_retries=0,
    )
    async with SGLangServer(config) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert said in str(caught.value.advice)
    assert "sk-sglang-secret" not in "\n".join(server.log.tail(200))
