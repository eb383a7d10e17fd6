"""`medreason chat` against a server whose answers are known."""

import signal
import threading
import time

import pytest

from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.generate.chat_client import Chat, converse, served_model
from medreason_jax.generate.requests import Request
from tests.generate.fake_engine import LENGTH, MODEL, FakeSession, answer_ids, fake_service, running


@pytest.fixture(scope="module")
def server(chat_tokenizer):
    with running(fake_service(chat_tokenizer, api_key="sesame"), "sesame") as server:
        yield server


@pytest.fixture
def expected(chat_tokenizer):
    def of(*texts):
        """The answer to a conversation of user and assistant texts in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        ids = chat_tokenizer.prompt(messages)
        request = Request(ids, LENGTH - len(ids), seed=0)
        return chat_tokenizer.decode(answer_ids(request, chat_tokenizer.end_id))

    return of


def chat_with(server):
    return Chat(server.url, served_model(server.url, server.key), server.key, settings={"seed": 0})


def test_answers_are_shown_in_parts_and_remembered(server, expected):
    chat, parts = chat_with(server), []
    assert chat.model == MODEL
    first = chat.ask("a", parts.append)
    assert "".join(parts) == first == expected("a")
    assert len(parts) > 1
    assert chat.ask("b", parts.append) == expected("a", first, "b")
    assert [message["role"] for message in chat.history] == ["user", "assistant"] * 2
    chat.clear()
    assert chat.ask("b", parts.append) == expected("b")


def test_a_system_prompt_comes_first(server):
    chat = chat_with(server)
    chat.system = "Be short."
    chat.ask("a", lambda part: None)
    session = server.session
    prompt = server.service.tokenizer.decode(list(session.requests[session.count].prompt))
    assert prompt.startswith("system\nBe short.") and len(chat.history) == 2


def talk(chat, lines):
    """What a conversation of these lines shows."""
    shown, rest = [], iter(lines)

    def read(_):
        line = next(rest, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    converse(chat, read, shown.append)
    return "".join(shown)


def test_a_conversation_knows_its_commands(server, expected):
    shown = talk(chat_with(server), ["a", "/clear", "", "/what", KeyboardInterrupt(), "b", "/quit"])
    assert shown.count(expected("a")) == 1 and expected("b") in shown
    assert "/what is no command" in shown
    assert talk(chat_with(server), []).endswith("\n")  # the end of input


def test_an_error_is_shown_and_takes_the_question_back(server):
    chat = chat_with(server)
    shown = talk(chat, ["x " * LENGTH])
    assert "failed: HTTP 400: messages of" in shown and chat.history == []
    chat.api_key = "wrong"
    assert "failed: HTTP 401: the API key is missing or wrong" in talk(chat, ["a"])
    chat.url = "http://127.0.0.1:9/v1"
    assert "failed: the server cannot be reached" in talk(chat, ["a"])


def test_ctrl_c_cancels_the_answer_at_the_server(chat_tokenizer):
    session = FakeSession(chat_tokenizer, round_seconds=0.3)
    with running(fake_service(chat_tokenizer, session)) as server:
        chat, shown = Chat(server.url, MODEL, settings={"seed": 0}), []

        def interrupt():
            while not any(shown):
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt).start()
        answer = chat.ask("a", shown.append)
        assert shown[-1] == " [cancelled]" and answer == "".join(shown[:-1])
        assert chat.history[-1]["content"] == answer
        server.wait_until(lambda: session.cancelled == [1])


def test_the_command_reads_lines_and_names_what_is_missing(server, monkeypatch, capsys, expected):
    lines = iter(["a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setenv("MEDREASON_CHAT_KEY", "sesame")
    arguments = ["chat", server.url + "/", "--api-key-env", "MEDREASON_CHAT_KEY"]
    assert exit_code_of(lambda: run_arguments([*arguments, "--max-tokens", "5"])) == 0
    assert f"{MODEL} at {server.url}" in capsys.readouterr().out
    assert server.session.requests[server.session.count].max_new_tokens == 5
    monkeypatch.delenv("MEDREASON_CHAT_KEY")
    assert exit_code_of(lambda: run_arguments(arguments)) == 2
    assert "MEDREASON_CHAT_KEY" in capsys.readouterr().err
    assert exit_code_of(lambda: run_arguments(["chat", "http://127.0.0.1:9/v1"])) == 1
    assert "failed: the server cannot be reached" in capsys.readouterr().err
