"""What the user chooses, validated once, at construction, and never changed afterwards.

Rule: a server reads its config and never writes to it, so that one config can start any number of servers, and
travel between processes (it pickles). Field names and meanings are those of datatrove's ``InferenceConfig``
where it has them; what is new or different is said in the docstring.
"""

from __future__ import annotations

import copy
import ipaddress
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args
from urllib.parse import urlsplit

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FrozenDict", "InferenceConfig", "ServerType", "Transport"]

ServerType = Literal["vllm", "sglang", "llamacpp", "transformers", "custom", "dummy", "endpoint"]
Transport = Literal["auto", "tcp", "uds"]

SERVER_TYPES: tuple[str, ...] = get_args(ServerType)
TRANSPORTS: tuple[str, ...] = get_args(Transport)
NEEDS_MODEL = frozenset({"vllm", "sglang", "llamacpp", "transformers"})

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[!-~]+")  # what can stand in a header
_OPTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


class FrozenDict(dict[str, Any]):
    """A dict that refuses changes. It is a real dict, so JSON, ``**`` and equality just work, and it pickles."""

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError("an InferenceConfig is immutable: make a changed copy with dataclasses.replace()")

    __setitem__ = __delitem__ = _refuse
    update = setdefault = pop = popitem = clear = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return FrozenDict(copy.deepcopy(dict(self), memo))


@dataclass(frozen=True, kw_only=False)
class InferenceConfig:
    """How to start, reach and stop one inference server.

    Attributes:
        server_type: which engine: vllm, sglang, llamacpp, transformers, custom, dummy or endpoint.
        model_name_or_path: the model to load, a Hugging Face name or a path. Needed by vllm, sglang, llamacpp and
            transformers; for the others it is the default ``model`` of requests.
        model_max_context: longest prompt plus answer, in tokens.
        use_chat: requests go to ``/v1/chat/completions`` (True) or ``/v1/completions`` (False).
        endpoint_url: base URL of a running server, for server_type "endpoint". With or without ``/v1``.
        api_key: sent as ``Authorization: Bearer``, and given to an engine by its environment, never by argv.
            Not part of ``repr``.
        tp, dp, pp: tensor, data and pipeline parallel size, in GPUs, replicas and stages.
        default_generation_params: merged under each request's payload (max_tokens, temperature, …).
        request_timeout: seconds for one request, with all its attempts, from the moment that the engine is ready to
            the complete answer; always holds.
        request_max_attempts: how often a request is sent at most, when connections break or the server asks to come
            again (408, 425, 429, 500 once, 502, 503, 504). 1 never sends it again.
        connect_timeout: seconds for a new connection, TLS included.
        stream_first_byte_timeout, stream_idle_timeout: seconds from a streamed request to its first event, and between
            two pieces of it; None waits as long as request_timeout allows.
        model_kwargs: more engine options: ``{"k": v}`` becomes ``--k=v``, True becomes ``--k``, False ``--no-k``.
        server_log_folder: where the engine's output is kept, one rotated file per rank and node, mode 0600.
        server_log_max_bytes: size at which that file is rotated, in bytes.
        master_port: port for the nodes of a multi-node engine to find each other.
        server_start_timeout_sec: seconds that spawning the engine's process may take (not its loading). trio
            starts processes in a thread of its default limiter: threads that wait for the server need another one.
        server_ready_max_attempts, server_ready_delay_sec: their product is the deadline for readiness, in seconds.
            Polling is adaptive: it begins at milliseconds, and the delay is its slowest pace, reached after
            minutes only.
        server_start_max_retries: how many more times a failed first start is tried, unless it would fail again for the
            same reason (a wrong option, a model that does not exist).
        max_restarts, restart_window: an engine that dies while it serves is started again, at most so many times in so
            many seconds; then the server has failed for good. 0 never starts it again, as the reference.
        restart_backoff_sec, restart_backoff_max_sec: the first restart comes at once, the second after at most the
            first of these; the pause doubles up to the second, with jitter.
        max_replays: how often a request whose engine died is sent to its successor.
        stall_timeout: seconds without any sign of progress after which an engine with requests under way counts as
            wedged, and is started again; None never does. See `trinfer.server.liveness` for the signs.
        probe_interval_sec: how often an idle engine is asked whether it is healthy, in seconds.
        idle_probe_sec: ask an engine that has been idle for so long for one token; None never does.
        start_stall_timeout: seconds without any sign of life after which a start counts as stuck; None never does.
        host: address that a local engine binds. Loopback unless told otherwise.
        transport: "uds" reaches a local engine through a unix socket in a private folder, "tcp" through a port,
            "auto" takes a unix socket where the engine can serve one.
        shutdown_grace_sec: seconds between SIGTERM and SIGKILL when an engine is stopped.
        trust_remote_code: let the engine run code that comes with a model. Off.
        env: more environment variables for the engine. Not part of ``repr``, since they may hold secrets.
        gpus: which GPUs the engine sees (CUDA_VISIBLE_DEVICES), as indexes or UUIDs; None leaves it as it is.
        served_model_name: name under which the engine serves the model; by default model_name_or_path.
        executable: the engine's program, where it is not the one on PATH.
        multi_node: whether this process is one node of an engine that spans several. None asks the environment
            (``DATATROVE_NODE_RANK``, SLURM, torchrun); False makes every node run an engine of its own.
        tls_ca_file: certificates (PEM) to trust at an https endpoint, instead of the system's.
        tls_cert_file, tls_key_file: our own certificate and key (PEM), for endpoints that ask for one.

    Raises:
        ConfigError: (also a ValueError) a value is impossible; the message names field, value and allowed range.
    """

    server_type: ServerType
    model_name_or_path: str = ""
    model_max_context: int = 8192
    use_chat: bool = True
    endpoint_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    tp: int = 1
    dp: int = 1
    pp: int = 1
    default_generation_params: Mapping[str, Any] = field(default_factory=FrozenDict)
    request_timeout: float = 3600.0
    request_max_attempts: int = 6
    connect_timeout: float = 30.0
    stream_first_byte_timeout: float | None = None
    stream_idle_timeout: float | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    server_log_folder: str | Path | None = None
    server_log_max_bytes: int = 100 * 2**20
    master_port: int = 9810
    server_start_timeout_sec: float = 60.0
    server_ready_max_attempts: int = 300
    server_ready_delay_sec: float = 5.0
    server_start_max_retries: int = 1
    max_restarts: int = 3
    restart_window: float = 600.0
    restart_backoff_sec: float = 1.0
    restart_backoff_max_sec: float = 60.0
    max_replays: int = 2
    stall_timeout: float | None = 300.0
    probe_interval_sec: float = 15.0
    idle_probe_sec: float | None = None
    start_stall_timeout: float | None = 300.0
    host: str = "127.0.0.1"
    transport: Transport = "auto"
    shutdown_grace_sec: float = 15.0
    trust_remote_code: bool = False
    env: Mapping[str, str] = field(default_factory=FrozenDict, repr=False)
    gpus: tuple[int | str, ...] | None = None
    served_model_name: str | None = None
    executable: str | None = None
    multi_node: bool | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None

    @property
    def ready_deadline_sec(self) -> float:
        """Seconds that an engine may take from its spawn until it answers."""
        return self.server_ready_max_attempts * self.server_ready_delay_sec

    @property
    def model(self) -> str:
        """The name that requests use for the model."""
        return self.served_model_name or self.model_name_or_path

    def __post_init__(self) -> None:
        self._one_of("server_type", SERVER_TYPES)
        self._one_of("transport", TRANSPORTS)
        for name in ("tp", "dp", "pp", "model_max_context", "server_ready_max_attempts", "request_max_attempts"):
            self._integer(name, 1, None)
        self._integer("master_port", 1, 65535)
        self._integer("server_log_max_bytes", 4096, None)
        for name in ("server_start_max_retries", "max_restarts", "max_replays"):
            self._integer(name, 0, None)
        for name in (
            *("request_timeout", "connect_timeout", "server_start_timeout_sec", "server_ready_delay_sec"),
            *("restart_window", "restart_backoff_max_sec", "probe_interval_sec"),
        ):
            self._seconds(name, positive=True)
        try:
            too_long = not math.isfinite(self.ready_deadline_sec)
        except OverflowError:
            too_long = True
        if too_long:
            self._refuse("server_ready_max_attempts", "a number whose product with server_ready_delay_sec is finite")
        for name in (
            *("stream_first_byte_timeout", "stream_idle_timeout"),
            *("stall_timeout", "idle_probe_sec", "start_stall_timeout"),
        ):
            if getattr(self, name) is not None:
                self._seconds(name, positive=True)
        for name in ("shutdown_grace_sec", "restart_backoff_sec"):
            self._seconds(name, positive=False)
        for name in ("use_chat", "trust_remote_code"):
            self._instance(name, bool, "True or False")
        if self.multi_node is not None:
            self._instance("multi_node", bool, "True, False or None")
        for name in ("model_name_or_path", "host"):
            self._text(name)
        for name in (
            *("endpoint_url", "api_key", "served_model_name", "executable"),
            *("tls_ca_file", "tls_cert_file", "tls_key_file"),
        ):
            if getattr(self, name) is not None:
                self._text(name)
                if not getattr(self, name):
                    self._refuse(name, "a non-empty text, or None")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            self._refuse("api_key", "a text of printable ASCII characters without spaces, or None")
        if not self._is_host(self.host):
            self._refuse("host", "a host name or an address without port and brackets, for instance 127.0.0.1 or ::1")
        if self.server_log_folder is not None and not isinstance(self.server_log_folder, str | Path):
            self._refuse("server_log_folder", "a path, or None")
        self._freeze("default_generation_params")
        self._freeze("model_kwargs")
        self._freeze("env")
        self._check_option_names()
        self._check_env()
        self._check_gpus()
        self._check_kind()

    # -- one check per shape of value ---------------------------------------------------------------------------

    def _refuse(self, name: str, allowed: str) -> NoReturn:
        value = getattr(self, name)
        shown = "(hidden)" if name in {"api_key", "env"} else repr(value)
        if name == "endpoint_url" and isinstance(value, str):
            # Users put their keys there, too.
            shown = repr(re.sub(r"\?.*", "?(hidden)", re.sub(r"^(\w+://)?.*@", r"\1(hidden)@", value)))
        raise ConfigError(f"InferenceConfig.{name} is {shown}: allowed is {allowed}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, "one of " + ", ".join(map(repr, allowed)))

    def _instance(self, name: str, kind: type, allowed: str) -> None:
        if not isinstance(getattr(self, name), kind):
            self._refuse(name, allowed)

    @staticmethod
    def _is_host(host: str) -> bool:
        if ":" in host:
            try:
                ipaddress.IPv6Address(host)
            except ValueError:
                return False
            return True
        return host != "" and not any(char.isspace() or char in "[]/@" for char in host)

    def _text(self, name: str) -> None:
        value = getattr(self, name)
        # Control characters would end up in a command line, a header or a log.
        if not isinstance(value, str) or any(ord(char) < 32 or ord(char) == 127 for char in value):
            self._refuse(name, "a text without control characters")

    def _integer(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
        if not ok or (high is not None and value > high):
            self._refuse(name, f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}")

    def _seconds(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            number = number and math.isfinite(value)
        except OverflowError:  # an integer that no float can hold
            number = False
        if not number or value < 0 or (positive and value == 0):
            self._refuse(name, f"a finite number of seconds {'>' if positive else '>='} 0")

    def _freeze(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            value = {}
        if not hasattr(value, "keys") or not all(isinstance(key, str) for key in value):
            self._refuse(name, "a mapping with text keys")
        try:
            frozen = FrozenDict(copy.deepcopy(dict(value)))
        except Exception as error:  # open files, generators, locks, …
            raise ConfigError(
                f"InferenceConfig.{name} holds something that cannot be copied ({error}): allowed are plain values"
            ) from error
        object.__setattr__(self, name, frozen)

    # -- checks of single fields and of fields together ---------------------------------------------------------

    def _check_option_names(self) -> None:
        for key in self.model_kwargs:
            if not _OPTION_NAME.fullmatch(key):
                raise ConfigError(
                    f"InferenceConfig.model_kwargs has the key {key!r}: allowed is an option name without leading "
                    "dashes, such as max_num_seqs or max-num-seqs"
                )

    def _check_env(self) -> None:
        for key, value in self.env.items():
            if not _ENV_NAME.fullmatch(key):
                raise ConfigError(f"InferenceConfig.env has the name {key!r}: allowed are letters, digits and _")
            if not isinstance(value, str) or "\0" in value:
                raise ConfigError(f"InferenceConfig.env[{key!r}] is not text: allowed are strings without NUL")

    def _check_gpus(self) -> None:
        if self.gpus is None:
            return
        allowed = "a sequence of GPU indexes >= 0 or UUIDs, each once, or None"
        given: object = self.gpus  # users without a type checker give other things
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            self._refuse("gpus", allowed)
        gpus: tuple[object, ...] = tuple(self.gpus)
        for gpu in gpus:
            index = isinstance(gpu, int) and not isinstance(gpu, bool) and gpu >= 0
            uuid = isinstance(gpu, str) and gpu != "" and "," not in gpu
            if not (index or uuid):
                self._refuse("gpus", allowed)
        if len(set(gpus)) != len(gpus):
            self._refuse("gpus", allowed)
        object.__setattr__(self, "gpus", gpus)

    def _check_kind(self) -> None:
        if self.server_type in NEEDS_MODEL and not self.model_name_or_path:
            self._refuse("model_name_or_path", f"a model's name or path, which {self.server_type} cannot do without")
        if self.server_type == "endpoint":
            if self.endpoint_url is None:
                self._refuse("endpoint_url", 'a URL such as "http://host:8000/v1" with server_type "endpoint"')
            allowed = 'a URL such as "http://host:8000/v1", without query and fragment'
            try:
                url = urlsplit(self.endpoint_url)
                port = url.port
                # As it goes over the wire; an address of IPv6 is no name.
                host = url.hostname or ""
                host = host if ":" in host else host.encode("idna").decode()
            except ValueError:  # brackets of IPv6 around something else, a port that is none, a name that cannot be
                self._refuse("endpoint_url", allowed)
            if url.scheme not in {"http", "https"} or not host or port == 0 or url.query or url.fragment:
                self._refuse("endpoint_url", allowed)
            if any(char.isspace() for char in host):
                self._refuse("endpoint_url", allowed)
            if re.search(r"/(completions|embeddings|models|responses)/*$", url.path):
                self._refuse("endpoint_url", "the URL without the route, which trinfer adds: http://host:8000/v1")
            if url.username or url.password:
                raise ConfigError(
                    "InferenceConfig.endpoint_url holds a user name or password: allowed is a plain URL",
                    advice="give the key as api_key, or in the environment variable TRINFER_API_KEY",
                )
        elif self.endpoint_url is not None:
            self._refuse("endpoint_url", f'None with server_type {self.server_type!r} (it is for "endpoint")')
        if self.server_type == "custom" and not (
            {"server_script", "server_command"} & self.model_kwargs.keys() or self.executable
        ):
            raise ConfigError(
                "InferenceConfig.model_kwargs lacks server_script or server_command, and executable is not set: "
                'allowed with server_type "custom" is one of them',
                advice="a script gets --port; a command is a template with {port}, {host}, {uds} and {model}",
            )

    def describe(self) -> dict[str, Any]:
        """The config as plain data without secrets, for logs and reports."""
        hidden = {"api_key", "env"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
