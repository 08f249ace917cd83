"""Where every process finds its settings and its paths.

Not a registry of everything adjustable: only what a person may set, each value checked once, here, with a message
that says what, the value, what is allowed and where it came from. Precedence: flag > `SLLM_*` > `sllm.toml` >
default. The supervisor writes the result to `run/config.json`; every process it starts reads that file, so the
parts of one platform never disagree. Standard library only: everything imports this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_faas.errors import BadSpec, Conflict
from sllm_faas.spec import MAX_PAYLOAD, Warmth

FILE_NAME = "sllm.toml"
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_NODE_NAME = 32
_SOCKET_LIMIT = 100
"""Bytes of a Unix socket's path that are safe (sun_path has 108)."""

Check = Callable[[Any], str]
"""What is allowed, when the value is not; otherwise ''."""


def default_state_dir(env: Mapping[str, str] = os.environ) -> Path:
    base = env.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "sllm"


def _between(low: float, high: float) -> Check:
    return lambda value: "" if low <= value <= high else f"{low:g} to {high:g}"


def _one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else ", ".join(choices)


def _anything(_value: Any) -> str:
    return ""


def _host(value: str) -> str:
    return "" if re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", value) else "an IP address or a host name"


def _listen(value: str) -> str:
    found = re.fullmatch(r"tcp://([^\s/:]+):(\d{1,5})", value)
    good = not value or (found is not None and 1 <= int(found[2]) <= 65535 and found[1] not in ("0.0.0.0", "*"))  # noqa: S104
    return "" if good else "'' or tcp://HOST:PORT, an address of this machine that the others reach"


def _node_name(value: str) -> str:
    good = not value or re.fullmatch(rf"[a-z0-9][a-z0-9-]{{0,{MAX_NODE_NAME - 1}}}", value)
    return "" if good else f"up to {MAX_NODE_NAME} lower-case letters, digits and '-'"


def _memory(value: int) -> str:
    return "" if value == 0 or 64 <= value <= 64 * 1024 * 1024 else "0 (80 % of the machine), or 64 to 67108864 MiB"


def _dram(value: int) -> str:
    return "" if -1 <= value <= 64 * 1024 * 1024 else "-1 (a quarter of memory_mb), 0 (none), or up to 67108864 MiB"


def _kind(value: int) -> str:
    return "" if -1 <= value <= 64 * 1024 * 1024 else "-1 (all of layers_mb), 0 (none), or up to layers_mb"


def _disk(value: int) -> str:
    return "" if 0 <= value <= 1024**3 else "0 (what the file system has), or up to 1073741824 MiB"


def _setting(default: Any, help_: str, check: Check = _anything, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_, "check": check, **metadata})


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one platform. Raises BadSpec for a value that is not allowed."""

    state_dir: Path = field(
        default_factory=default_state_dir,
        metadata={"help": "directory of everything the platform keeps", "check": _anything},
    )
    host: str = _setting("127.0.0.1", "address the gateways listen on", _host)
    port: int = _setting(8700, "port of the gateways", _between(1, 65535))
    gateways: int = _setting(1, "gateway processes sharing the port", _between(1, 64))
    invokers: int = _setting(1, "invokers on this machine", _between(0, 64))
    listen: str = _setting(
        "", "endpoint for other machines, tcp://HOST:PORT: nodes join there, and find it in their join token", _listen
    )
    memory_mb: int = _setting(0, "MiB for all functions of this machine; 0: 80 % of it", _memory)
    dram_mb: int = _setting(
        -1, "MiB of memory that keep checkpoints; -1: a quarter of memory_mb; 0: the page cache alone", _dram
    )
    layers_mb: int = _setting(
        -1, "MiB of memory that keep warmth layers; -1: an eighth of memory_mb; 0: none above base", _dram
    )
    libs_mb: int = _setting(-1, "MiB of layers_mb that imported libraries may take; -1: all; 0: none is kept", _kind)
    template_mb: int = _setting(
        -1, "MiB of layers_mb that templates of models may take; -1: all; 0: none is kept", _kind
    )
    disk_mb: int = _setting(
        0, "MiB of disk for all checkpoints of this machine; 0: what the file system has, but a reserve", _disk
    )
    prefetch: bool = _setting(True, "read checkpoints into free memory when a version is deployed")
    copies: int = _setting(
        2, "machines with each checkpoint of what serves on their disk; 0: none is brought ahead", _between(0, 64)
    )
    log_level: str = _setting("info", "least severe log lines kept", _one_of(*LOG_LEVELS))
    open_invoke: bool | None = _setting(None, "invoke without a token; unset: only when host is loopback")
    shutdown_grace: float = _setting(30.0, "seconds that running invocations get at a stop", _between(0.0, 3600.0))
    orphan_grace: float = _setting(10.0, "seconds a lost gateway's invocations are kept", _between(0.0, 600.0))
    stream_window: int = _setting(1024, "outputs kept for a re-attaching client", _between(1, 1_000_000))
    max_body: int = _setting(MAX_PAYLOAD, "bytes of one HTTP body", _between(1024, MAX_PAYLOAD))
    join: str = _setting("", "join token: this machine is a node of another machine's platform", secret=True)
    node_name: str = _setting("", "name of this node where it joins; default: the host name", _node_name)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_dir", Path(os.path.abspath(os.path.expanduser(self.state_dir))))  # noqa: PTH100, PTH111 - resolve() would follow links
        for item in dataclasses.fields(self):
            _validate(item, getattr(self, item.name), "")
            if item.name in ("libs_mb", "template_mb") and 0 <= self.layers_mb < getattr(self, item.name):
                raise _bad(item, getattr(self, item.name), f"-1, or up to layers_mb ({self.layers_mb})", "")

    # -- derived ---------------------------------------------------------------------------------------------

    @property
    def db_path(self) -> Path:
        return self.state_dir / "controller.db"

    @property
    def bundles_dir(self) -> Path:
        return self.state_dir / "bundles"

    @property
    def checkpoints_dir(self) -> Path:
        return self.state_dir / "checkpoints"

    @property
    def logs_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def secrets_dir(self) -> Path:
        return self.state_dir / "secrets"

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / "keys"

    @property
    def lock_path(self) -> Path:
        return self.state_dir / "lock"

    @property
    def admin_token_path(self) -> Path:
        return self.state_dir / "admin.token"

    @property
    def run_dir(self) -> Path:
        """STATE/run; when a socket in it would have too long a path, /tmp/sllm-UID-HASH.

        Not XDG_RUNTIME_DIR: another shell may have another one, and logging out removes it under a daemon."""
        inside = self.state_dir / "run"
        longest = len(os.fsencode(inside)) + len("/.sock") + MAX_NODE_NAME
        if longest <= _SOCKET_LIMIT:
            return inside
        mark = hashlib.blake2b(os.fsencode(self.state_dir), digest_size=8).hexdigest()
        return Path("/tmp") / f"sllm-{os.getuid()}-{mark}"  # noqa: S108 - made 0700, ownership checked in prepare()

    @property
    def config_path(self) -> Path:
        return self.run_dir / "config.json"

    @property
    def supervisor_path(self) -> Path:
        return self.run_dir / "supervisor.json"

    @property
    def metrics_dir(self) -> Path:
        return self.run_dir / "metrics"

    @property
    def controller_endpoint(self) -> str:
        return f"ipc://{self.run_dir}/controller.sock"

    def node_dir(self, name: str) -> Path:
        return self.state_dir / "nodes" / name

    def node_endpoint(self, name: str) -> str:
        """Where the invoker `name` is reached by gateways."""
        return f"ipc://{self.run_dir}/{name}.sock"

    @property
    def loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def invocation_open(self) -> bool:
        """Whether functions may be invoked without a token."""
        return self.loopback if self.open_invoke is None else self.open_invoke

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def node_memory_mb(self) -> int:
        """MiB one invoker may hand out: its share of `memory_mb`, or of 80 % of the machine."""
        return (self.memory_mb or machine_memory_mb() * 4 // 5) // max(1, self.invokers)

    @property
    def node_dram_mb(self) -> int:
        """MiB of memory in which one invoker keeps checkpoints."""
        return self.node_memory_mb // 4 if self.dram_mb < 0 else self.dram_mb // max(1, self.invokers)

    @property
    def node_layers_mb(self) -> int:
        """MiB of memory in which one invoker keeps warmth layers."""
        return self.node_memory_mb // 8 if self.layers_mb < 0 else self.layers_mb // max(1, self.invokers)

    @property
    def node_layer_budgets(self) -> dict[Warmth, float]:
        """MiB of memory in which one invoker keeps the layers of each kind that has a budget of its own."""
        given: dict[Warmth, int] = {"libs": self.libs_mb, "template": self.template_mb}
        return {kind: value // max(1, self.invokers) for kind, value in given.items() if value >= 0}

    # -- making, writing, reading ----------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        toml_path: Path | None = None,
        cwd: Path | None = None,
    ) -> tuple[Config, dict[str, str]]:
        """The settings and, for each, where it came from. A flag of None was not given.

        `toml_path` must exist when given; otherwise `sllm.toml` of `cwd` is read when there is one.
        Raises BadSpec naming the value and its source."""
        env = os.environ if env is None else env
        path = toml_path or (cwd or Path.cwd()) / FILE_NAME
        table = read_toml(path, must_exist=toml_path is not None)
        check_keys(table, [item.name for item in dataclasses.fields(cls)], str(path))
        given = {name: value for name, value in (flags or {}).items() if value is not None}
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for item in dataclasses.fields(cls):
            variable = f"SLLM_{item.name.upper()}"
            if item.name in given:
                value, source = given[item.name], "flag --" + item.name.replace("_", "-")
            elif env.get(variable, "") != "":
                source = f"environment {variable}"
                value = _parse(item, env[variable], source)
            elif item.name in table:
                value, source = table[item.name], str(path)
            else:
                value = default_state_dir(env) if item.name == "state_dir" else item.default
                source = "default"
            if item.name == "state_dir" and source == str(path) and isinstance(value, str):
                value = path.parent / Path(value).expanduser()
            value = _typed(item, value, source)
            _validate(item, value, source)
            values[item.name], sources[item.name] = value, source
        return cls(**values), sources

    def write(self, path: Path) -> None:
        """Atomically, readable by the owner alone."""
        write_private(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> Config:
        """What `write` wrote. Raises BadSpec when it is not that."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadSpec(f"configuration {path} cannot be read: {error}", hint="Start with `sllm up`.") from None
        return cls.from_json(text, str(path))

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "state_dir": str(self.state_dir)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str) -> Config:
        """Raises BadSpec, naming `source`."""
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise BadSpec(f"configuration {source} is not JSON: {error}") from None
        if not isinstance(plain, dict):
            raise BadSpec(f"configuration {source} is not a JSON object")
        fields = {item.name: item for item in dataclasses.fields(cls)}
        check_keys(plain, list(fields), source)
        return cls(**{name: _typed(fields[name], value, source) for name, value in plain.items()})

    def prepare(self) -> None:
        """Make the directories: 0700, because bundles, prompts' caches and sockets are the owner's alone.

        Raises Conflict when the run directory outside the state directory belongs to somebody else."""
        for directory in (self.state_dir, self.secrets_dir, self.keys_dir, self.bundles_dir, self.logs_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # It may lie in a project, and holds tokens and keys: neither git nor `sllm deploy` takes them along.
        with contextlib.suppress(FileExistsError), (self.state_dir / ".gitignore").open("x") as file:
            file.write("*\n")
        self.run_dir.mkdir(exist_ok=True, mode=0o700)
        found = self.run_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Conflict(
                f"{self.run_dir} is not a directory of this user", hint="Remove it, or use another state_dir."
            )
        self.run_dir.chmod(0o700)
        self.metrics_dir.mkdir(exist_ok=True, mode=0o700)


def settings() -> list[tuple[str, str, str, bool]]:
    """(name, type, help, secret) of each setting, for the command line and the documentation."""
    return [
        (item.name, str(item.type), item.metadata["help"], bool(item.metadata.get("secret")))
        for item in dataclasses.fields(Config)
    ]


# -- values --------------------------------------------------------------------------------------------------

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_ALLOWED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "bool | None": "true or false",
    "str": "text",
    "Path": "a path",
}
Field = dataclasses.Field[Any]


def _bad(item: Field, value: Any, allowed: str, source: str) -> BadSpec:
    shown = "(hidden)" if item.metadata.get("secret") else repr(value)
    origin = f" (from {source})" if source else ""
    return BadSpec(f"{item.name} is {shown}{origin}; allowed: {allowed}", param=item.name)


def _parse(item: Field, text: str, source: str) -> Any:
    """A value written as text, as in an environment variable."""
    try:
        if item.type == "int":
            return int(text)
        if item.type == "float":
            return float(text)
    except ValueError:
        raise _bad(item, text, _ALLOWED[str(item.type)], source) from None
    if item.type in ("bool", "bool | None"):
        if text.lower() not in _TRUE + _FALSE:
            raise _bad(item, text, _ALLOWED["bool"], source)
        return text.lower() in _TRUE
    return text


def _typed(item: Field, value: Any, source: str) -> Any:
    """`value` as the field's type; whole numbers are floats too, text is a path, nothing else converts."""
    kind = str(item.type)
    if kind == "Path" and isinstance(value, str) and value:
        return Path(value).expanduser()
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    good = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, float),
        "str": isinstance(value, str) and "\0" not in str(value),
        "bool": isinstance(value, bool),
        "bool | None": value is None or isinstance(value, bool),
        "Path": isinstance(value, Path),
    }[kind]
    if not good:
        raise _bad(item, value, _ALLOWED[kind], source)
    return value


def _validate(item: Field, value: Any, source: str) -> None:
    _typed(item, value, source)
    allowed = item.metadata["check"](value)
    if allowed:
        raise _bad(item, value, allowed, source)


def check_keys(table: Mapping[str, Any], allowed: list[str], source: str) -> None:
    """Raises BadSpec for a key that is not one, with the nearest that is."""
    for key in table:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(allowed))}."
            raise BadSpec(f"{source} has an unknown key {key!r}", param=key, hint=hint)


def read_toml(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    """The table in `path`, empty when there is no such file and it need not exist. Raises BadSpec."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise BadSpec(f"there is no configuration file {str(path)!r}") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSpec(f"{path} cannot be read: {error}") from None


def write_private(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, mode 0600 from the first byte on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
    temporary.replace(path)


def machine_memory_mb() -> int:
    """MiB of this machine, or of the control group it confines us to."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) // (1024 * 1024)
