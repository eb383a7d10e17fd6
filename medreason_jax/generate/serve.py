"""`medreason serve`: load a model, bind an address, serve until told to end.

A first SIGTERM or SIGINT lets running answers finish; a second one ends the server now.
"""

import asyncio
import ctypes
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from medreason_jax.config import MeshConfig
from medreason_jax.generate.answering import Limits
from medreason_jax.generate.engine import CHUNK, Session, size_for
from medreason_jax.generate.engine_thread import Driver
from medreason_jax.generate.prompt_scores import PromptScorer
from medreason_jax.generate.requests import Request
from medreason_jax.generate.server import Service
from medreason_jax.qwen2.load import Loaded, load_model

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SCORE_CHUNK = 1024  # tokens whose logits exist at a time
DEFAULT_LENGTH = 4096  # prompt and new tokens; less where the model's longest row is less
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h
LARGE, ARENAS = 2**20, 2  # bytes of a large block; heaps that threads share
LAST_SECONDS = 5  # for clients to take the end of their answers, when nothing is left to do


def serve_model(
    folder: Path,
    *,
    host: str,
    port: int,
    slots: int,
    length: int | None,
    queue: int,
    max_body: int,
    dtype: str,
    name: str | None,
    api_key_env: str | None,
    warm: bool,
    ready: Callable[[str, str], None],
) -> None:
    """Serve until told to end; `ready` gets the model's name and the base URL once it listens.

    RuntimeError when the engine fails, or when a second signal cut answers off.
    """
    keep_memory_small()
    api_key = read_key(host, api_key_env)
    listener = bind(host, port)
    loaded = load_model(folder, MeshConfig(), dtype).merged()
    name = folder.resolve().name if name is None else name
    service = make_service(
        loaded,
        name,
        slots=slots,
        length=length,
        queue=queue,
        max_body=max_body,
        api_key=api_key,
        warm=warm,
    )
    del loaded  # the parameters as they were read; the session has them as it decodes
    asyncio.run(run(service, listener, lambda: ready(name, base_url(host, listener))))


def make_service(
    loaded: Loaded,
    name: str,
    *,
    slots: int,
    length: int | None,
    queue: int,
    max_body: int,
    api_key: str | None,
    warm: bool,
) -> Service:
    """The service of a model on its mesh: engine, scorer, the thread that drives both."""
    sizes = loaded.network.sizes
    length = min(DEFAULT_LENGTH, sizes.max_length) if length is None else length
    loaded.check_length(length)
    engine = loaded.engine(slots)
    session = engine.session(loaded.params, length=length)
    tokenizer, scorer = loaded.tokenizer, loaded.scorer(SCORE_CHUNK)
    scoring = PromptScorer(scorer, loaded.mesh, session.params, length, tokenizer.pad_id)
    if warm:
        warm_up(session, length)
    driver = Driver(session, scoring, engine.slots + queue)
    limits = Limits(length, driver.capacity, max_body, sizes.vocab_size)
    return Service(name, tokenizer, driver, limits, api_key)


def warm_up(session: Session, length: int) -> None:
    """Run the programs that answers will need, so that none waits for a compilation.

    The shortest and the longest prompt of every size, and those with which a first round of
    decoding ends at every size; each alone with alternatives, then without, and copied while the
    first is at work.
    """
    sizes = [1]
    while sizes[-1] < length:
        sizes.append(size_for(sizes[-1] + 1))
    counts = {size - less for size in sizes for less in (-1, 0, CHUNK)}
    for prompt in ([0] * count for count in sorted(counts) if 0 < count < length):
        finish(session, Request(prompt, 1, top_logprobs=1))
        request = Request(prompt, min(2 * CHUNK, length - len(prompt)), 1.0, top_p=0.9)
        session.submit(request)
        session.round()
        finish(session, request)


def finish(session: Session, request: Request) -> None:
    session.submit(request)
    while not session.idle:
        session.round()


async def run(service: Service, listener: socket.socket, ready: Callable[[], None]) -> None:
    """The HTTP server around a service, from its start to its end."""
    config = uvicorn.Config(
        service.app(),
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    server, loop = uvicorn.Server(config), asyncio.get_running_loop()
    service.stop = lambda: setattr(server, "should_exit", True)
    service.driver.start(loop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:  # in place of uvicorn's, which refuse new connections
            loop.add_signal_handler(number, service.drain)
    ready()
    await serving
    await asyncio.to_thread(service.driver.stop, LAST_SECONDS)
    if service.driver.failure is not None:
        error = service.driver.failure
        raise RuntimeError(f"the engine stopped by {type(error).__name__}: {error!s:.500}")
    if service.cut_off is not None:
        raise RuntimeError(f"ended by a second signal; answers cut off: {service.cut_off}")


def keep_memory_small() -> None:
    """Let the C library give large blocks back at once and keep few arenas; before any thread.

    With glibc's own choice 598 MB became 640 under 64 clients in eight minutes, while 247 were in
    use: each thread's arena grew, and the limit from which a block goes back to the system rose.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have none
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_ARENA_MAX, ARENAS)


def read_key(host: str, variable: str | None) -> str | None:
    """The API key in an environment variable; needed where others can reach the server."""
    if variable is None:
        if not is_loopback(host):
            raise ValueError(
                f"--host {host} can be reached by others; name an environment variable that holds "
                "an API key: --api-key-env NAME"
            )
        return None
    key = os.environ.get(variable, "")
    if not key or any(character.isspace() for character in key):
        raise ValueError(
            f"--api-key-env {variable}: the variable is not set, or holds more than one key"
        )
    return key


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening: a taken port is told before the model loads."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror}; take another, port 0 for any"
        ) from None
    return listener


def base_url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/v1"
