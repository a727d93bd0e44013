"""`steer2edit serve`: loads a model and its edits, and serves them until it is stopped."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from ..engines.plan import Model, load_section
from ..engines.transformers import TransformersEngine
from ..errors import Interrupted, Steer2EditError
from ..progress import say
from .catalogue import Catalogue
from .sources import Source
from .worker import Worker


def require(package: str, extra: str) -> None:
    """Raises Steer2EditError if a package of an extra is not installed."""
    if find_spec(package) is None:
        raise Steer2EditError(
            f"the package {package} is needed", got="not installed", fix=f"pip install 'steer2edit[{extra}]'."
        )


@contextlib.contextmanager
def opened(
    section: Model,
    sources: Sequence[Source],
    *,
    rows: int,
    waiting: int = 128,
    context: int = 8192,
    tokens: int = 1024,
    threads: int | None = None,
) -> Iterator[tuple[Worker, Catalogue]]:
    """A loaded model with its edits, whose worker runs while the context lasts.

    Args:
        rows: the most requests that run at once. waiting, context, tokens, threads: see Worker.

    Raises:
        ModelError: the model cannot be loaded, its family cannot be served, or an edit is of another model.
    """
    say(f"loading {section.name}")
    model, tokenizer = load_section(section)
    engine = TransformersEngine(model, tokenizer, rows=rows, chat=section.chat)
    catalogue = Catalogue(model, section.name, sources)
    worker = Worker(engine, waiting=waiting, context=context, tokens=tokens, threads=threads)
    try:
        yield worker, catalogue
    finally:
        worker.close()


def key_of(variable: str | None, host: str) -> str | None:
    """The token that an environment variable holds.

    Raises:
        Steer2EditError: the variable is empty, or other machines could reach a server without a token.
    """
    if variable is None:
        if not is_loopback(host):
            raise Steer2EditError(
                "a server that other machines can reach needs a token",
                got=f"--host {host} and no --api-key",
                fix="Give --api-key NAME, the name of an environment variable that holds one.",
            )
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise Steer2EditError(
            "the environment variable of the token is empty",
            got=variable,
            fix=f"Set it first: export {variable}=…; --api-key takes the variable's name, not the token.",
        )
    return key


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket on an address. Raises Steer2EditError if it is taken or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise Steer2EditError(
            "the address cannot be used", got=f"{host}:{port}, {error}", fix="Give another --port or --host."
        ) from None


def serve_on(worker: Worker, catalogue: Catalogue, bound: socket.socket, key: str | None) -> None:
    """Serves on a socket until Ctrl-C, which raises Interrupted."""
    run_until_stopped(server_on(worker, catalogue, bound, key), bound)


def server_on(worker: Worker, catalogue: Catalogue, bound: socket.socket, key: str | None) -> Any:
    """A uvicorn server for a socket that listens."""
    from .app import build_app

    address, hosts = address_of(bound)
    say(f"  serving {', '.join(catalogue.names())} on {address}/v1")
    say(f"  up to {worker.engine.slots} requests at once, {worker.context} tokens each")
    return http_server(build_app(worker, catalogue, key=key, hosts=hosts))


def address_of(bound: socket.socket) -> tuple[str, tuple[str, ...]]:
    """The URL of a socket that listens, and the names under which it may be addressed: none is all.

    It says who can reach it.
    """
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not is_loopback(host):
        say("  other machines can reach it; Ctrl-C ends it")
        return url, ()
    say("  only this machine can reach it; Ctrl-C ends it")
    return url, ("localhost", "127.0.0.1", "::1", host)


def run_until_stopped(server: Any, bound: socket.socket) -> None:
    """Runs a uvicorn server, which raises Ctrl-C again once it has closed."""
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        raise Interrupted("nothing is served any more") from None


def http_server(app: Any) -> Any:
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5)
    )
