"""How the server starts and ends: signals, a broken engine, clients that stall, bad options."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.generate import server as server_module
from medreason_jax.generate.serve import read_key
from tests.generate.fake_engine import MODEL, FakeSession, fake_service, running

MESSAGES = [{"role": "user", "content": "How often is Velotan given?"}]


class Process:
    """The server in a process of its own; a round takes `seconds`."""

    def __init__(self, folder, seconds: float, *more: str):
        arguments = ["-m", "tests.generate.fake_engine", str(folder), str(seconds), *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.url = json.loads(line)
        http = openai.DefaultHttpxClient(trust_env=False)
        self.api = openai.OpenAI(base_url=self.url, api_key="x", max_retries=0, http_client=http)

    def stream(self, **fields):
        fields = {"model": MODEL, "messages": MESSAGES, "seed": 0, **fields}
        return self.api.chat.completions.create(stream=True, **fields)

    def end(self, seconds: float = 20) -> tuple[int, str]:
        """(exit code, stderr) when it has ended by itself."""
        _, error = self.process.communicate(timeout=seconds)
        return self.process.returncode, error.strip()


@pytest.fixture
def start(tokenizer_folder):
    started = []

    def new(*arguments):
        started.append(Process(tokenizer_folder, *arguments))
        return started[-1]

    yield new
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_a_signal_lets_running_answers_finish_and_refuses_new_ones(start):
    server = start(0.15)
    answer = iter(server.stream())
    parts = [next(answer), next(answer)]
    server.process.terminate()
    deadline = time.monotonic() + 5
    while True:
        try:
            server.stream().close()
        except openai.InternalServerError as error:
            assert error.status_code == 503 and "the server is ending" in str(error)
            break
        assert time.monotonic() < deadline
    health = httpx.get(server.url.replace("/v1", "/health"), trust_env=False)
    assert health.status_code == 503 and health.json()["status"] == "draining"
    parts += answer
    assert parts[-1].choices[0].finish_reason == "stop"
    assert server.end() == (0, "")


def test_a_signal_ends_an_idle_server(start):
    server = start(0.0)
    server.process.send_signal(signal.SIGINT)
    assert server.end() == (0, "")


def test_a_second_signal_ends_the_server_now(start):
    server = start(0.5)
    answer = iter(server.stream())
    next(answer)
    server.process.terminate()
    time.sleep(0.2)
    start_time = time.monotonic()
    server.process.terminate()
    with pytest.raises(openai.APIError, match="the server was told to end"):
        list(answer)
    code, error = server.end(10)
    assert time.monotonic() - start_time < 5
    assert (code, error) == (1, "failed: ended by a second signal; answers cut off: 1")


def test_a_broken_engine_ends_the_server_with_one_line(start):
    server = start(1.0, "fails")
    chat = server.api.chat.completions
    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(lambda: list(server.stream()))
        whole = pool.submit(lambda: chat.create(model=MODEL, messages=MESSAGES))
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            streamed.result()
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            whole.result()
    code, error = server.end()
    assert code == 1
    assert error == "failed: the engine stopped by RuntimeError: out of memory on the device"


def test_a_client_that_takes_nothing_loses_its_answer(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(server_module, "STALLED_SECONDS", 0.3)
    session = FakeSession(chat_tokenizer)
    service = fake_service(chat_tokenizer, session, queue=200)
    fields = {"model": MODEL, "messages": MESSAGES, "stream": True, "n": 100, "logprobs": True}
    body = json.dumps(fields | {"top_logprobs": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with running(service, send_buffer=4096) as server:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(server.url.split(":")[2].split("/")[0])))
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        server.wait_until(lambda: session.count == 100)
        server.wait_until(lambda: service.driver.used == 0, seconds=20)
        raw.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others"),
        (["--host", "example.com"], "--host example.com can be reached by others"),
        (["--api-key-env", "MEDREASON_NO_KEY"], "--api-key-env MEDREASON_NO_KEY: the variable is"),
        (["--dtype", "float16"], "--dtype 'float16' is not allowed"),
        (["--slots", "0"], "slots"),
        (["--port", "0"], "nothing_here is no folder"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, options, said):
    arguments = ["serve", str(tmp_path / "nothing_here"), *options]
    assert exit_code_of(lambda: run_arguments(arguments)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert said in error


def test_a_taken_port_is_told_before_the_model_is_read(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        arguments = ["serve", str(tmp_path / "nothing_here"), "--port", port]
        assert exit_code_of(lambda: run_arguments(arguments)) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_key(host):
    assert read_key(host, None) is None


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MEDREASON_KEY", "sesame")
    assert read_key("0.0.0.0", "MEDREASON_KEY") == "sesame"
    for wrong in ("", "two words"):
        monkeypatch.setenv("MEDREASON_KEY", wrong)
        with pytest.raises(ValueError, match="MEDREASON_KEY"):
            read_key("127.0.0.1", "MEDREASON_KEY")
