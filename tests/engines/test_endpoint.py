"""`EndpointServer` against a server that runs already: nothing is started, the key is found, refusals are told."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from trinfer import AuthenticationError, ConfigError, EndpointServer, InferenceConfig, ServerError, ServerState
from trinfer.engines.dummy_app import DummyApp, DummyOptions
from trinfer.http.serving import HttpRequest, HttpResponse, json_response, serve_http

CHAT = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}


@asynccontextmanager
async def serving(app):
    """A server of somebody else; yields its URL."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        await nursery.start(serve_http, app, listeners)
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


def dummy(**options):
    return DummyApp("m", max_context=1000, options=DummyOptions(), **options)


def config(url, **fields):
    return InferenceConfig("endpoint", endpoint_url=url, **{"server_start_max_retries": 0, **fields})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_with_or_without_v1(suffix):
    async with serving(dummy()) as url:
        async with EndpointServer(config(url + suffix)) as server:
            assert server.get_base_url() == url
            answer = await server.make_request(CHAT)
            assert await server.is_ready()
        assert answer["model"] == "m"  # found out from the server, as none was configured
        assert server.state is ServerState.STOPPED


async def test_a_base_path_is_kept():
    app = dummy()

    async def under_api(request: HttpRequest) -> HttpResponse:
        if not request.target.startswith("/api/"):
            return json_response({"error": {"message": "not here"}}, 404)
        request.target = request.target.removeprefix("/api")
        return await app(request)

    async with serving(under_api) as url, EndpointServer(config(f"{url}/api/v1")) as server:
        assert server.get_base_url() == f"{url}/api"
        assert (await server.make_request(CHAT))["choices"]


@pytest.mark.parametrize(
    ("fields", "environ"),
    [
        ({"api_key": "right"}, {"TRINFER_API_KEY": "wrong", "OPENAI_API_KEY": "wrong"}),
        ({}, {"TRINFER_API_KEY": "right", "OPENAI_API_KEY": "wrong"}),
        ({}, {"OPENAI_API_KEY": "right"}),
    ],
)
async def test_where_the_key_comes_from(fields, environ, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with serving(dummy(api_key="right")) as url, EndpointServer(config(url, **fields)) as server:
        assert (await server.make_request(CHAT))["choices"]


@pytest.mark.parametrize("fields", [{}, {"api_key": "wrong"}])
async def test_a_refused_key_is_told_at_once(fields):
    began = trio.current_time()
    async with serving(dummy(api_key="right")) as url, EndpointServer(config(url, **fields)) as server:
        with pytest.raises(ServerError, match="refuses the API key \\(status 401\\)") as caught:
            await server.wait_ready()
    assert trio.current_time() - began < 5
    assert "TRINFER_API_KEY" in str(caught.value.advice)
    assert "wrong" not in caught.value.message


async def test_an_endpoint_that_lists_no_models_is_used_all_the_same():
    app = dummy()

    async def without_models(request: HttpRequest) -> HttpResponse:
        return json_response({}, 404) if request.path == "/v1/models" else await app(request)

    async with serving(without_models) as url, EndpointServer(config(url, model_name_or_path="m")) as server:
        assert (await server.make_request(CHAT))["choices"]


async def test_an_endpoint_that_is_still_loading_is_waited_for():
    app = DummyApp("m", max_context=1000, options=DummyOptions(load_time=0.3))
    async with serving(app) as url, EndpointServer(config(url)) as server:
        began = trio.current_time()
        await server.wait_ready()
    assert 0.1 < trio.current_time() - began < 3


async def test_a_key_that_is_refused_later_is_the_requests_error():
    app = dummy()
    is_revoked = False

    async def revoking(request: HttpRequest) -> HttpResponse:
        return json_response({"error": {"message": "revoked"}}, 401) if is_revoked else await app(request)

    async with serving(revoking) as url, EndpointServer(config(url)) as server:
        await server.wait_ready()
        is_revoked = True
        with pytest.raises(AuthenticationError, match="revoked"):
            await server.make_request(CHAT)
        assert server.state is ServerState.READY


def test_without_a_url():
    with pytest.raises(ConfigError, match="endpoint_url"):
        EndpointServer(InferenceConfig("dummy"))


async def test_a_redirect_is_told_at_once():
    async def moved(_: HttpRequest) -> HttpResponse:
        return HttpResponse(308, headers={"Location": "https://elsewhere/v1/models"})

    async with serving(moved) as url, EndpointServer(config(url)) as server:
        with trio.fail_after(5), pytest.raises(ServerError, match="redirects elsewhere") as caught:
            await server.wait_ready()
        assert "endpoint_url" in str(caught.value)


async def test_a_start_that_ends_within_a_look_tells_what_the_looks_before_have_found():
    looks = 0

    async def first_busy_then_silent(_: HttpRequest) -> HttpResponse:
        nonlocal looks
        looks += 1
        if looks > 2:
            await trio.sleep_forever()
        return HttpResponse(503)

    short = {"server_ready_max_attempts": 1, "server_ready_delay_sec": 1}
    async with serving(first_busy_then_silent) as url, EndpointServer(config(url, **short)) as server:
        with pytest.raises(ServerError, match="status 503"):
            await server.wait_ready()


async def test_https_at_a_port_that_speaks_http_is_told():
    short = {"server_ready_max_attempts": 1, "server_ready_delay_sec": 1}
    async with serving(dummy()) as url, EndpointServer(config(url.replace("http:", "https:"), **short)) as server:
        with pytest.raises(ServerError, match=r"/v1/models: \S.*SSL"):
            await server.wait_ready()
