"""`medreason serve` from outside: as data generation's teacher and judge, and to its end."""

import asyncio

import openai
import pytest

from data_gen.budget import Budget
from data_gen.config import Role
from data_gen.endpoints import open_roles
from data_gen.journal import Journal
from data_gen.teacher import Patience, Teacher, TeacherFailed
from data_gen.transport import open_wire
from data_gen.verifiers import TeacherVerifier
from tests.generate.serve_command import served, write_model

MESSAGES = [{"role": "user", "content": "How often is Velotan given?"}]


@pytest.fixture(scope="module")
def server(chat_tokenizer, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("serve") / "tiny", chat_tokenizer)
    with served(folder, "--slots", "4", "--length", "256") as (process, url):
        yield process, url
        process.terminate()
        _, error = process.communicate(timeout=20)
        assert (process.returncode, error) == (0, "")


def ask_as_data_gen(url, tmp_path, work, **settings):
    """Run `work(teacher)` for a role whose teacher is the server."""
    role = Role(base_url=url, model="tiny", **{"max_tokens": 12, "seed": 3, **settings})

    async def run():
        journal = Journal(tmp_path / "journal.sqlite")
        try:
            with open_roles({"reasoner": role}) as places:
                async with open_wire() as wire:
                    patience = Patience(3, 0.01, 0.05)
                    teacher = Teacher(places["reasoner"], wire, journal, Budget(4), patience)
                    return await work(teacher)
        finally:
            await journal.drain()
            journal.close()

    return asyncio.run(run())


def test_data_generation_has_it_as_a_teacher(server, tmp_path):
    _, url = server
    http = openai.DefaultHttpxClient(trust_env=False)
    api = openai.OpenAI(base_url=url, api_key="x", max_retries=0, http_client=http)

    async def ask(teacher):
        return [await teacher.ask(MESSAGES, sample) for sample in (0, 1, 0)]

    first, second, again = ask_as_data_gen(url, tmp_path, ask, top_p=0.9)
    assert first.answer == again.answer != second.answer
    fields = {"model": "tiny", "messages": MESSAGES, "temperature": 1.0, "top_p": 0.9}
    for call, seed in ((first, 3), (second, 4)):
        reply = api.chat.completions.create(**fields, seed=seed, max_tokens=12)
        assert call.answer == reply.choices[0].message.content
        assert call.finish == reply.choices[0].finish_reason
        assert call.completion_tokens == reply.usage.completion_tokens
        assert call.prompt_tokens == reply.usage.prompt_tokens


def test_data_generation_has_it_as_a_judge(server, tmp_path):
    """A model with random weights gives no verdict: unscored with the reason, after a repair."""
    _, url = server

    async def judge(teacher):
        verifier = TeacherVerifier(teacher, "Is {conclusion} = {answer}?", "{error}: again")
        return await verifier.verify("2 times a day", "twice a day", "How often?")

    verdict = ask_as_data_gen(url, tmp_path, judge, temperature=0.0)
    assert verdict.outcome == "unscored" and len(verdict.calls) == 2
    assert verdict.reason.startswith("the verifier's reply: ")


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_a_schema_that_it_cannot_follow_is_told(server, tmp_path, form):
    _, url = server

    async def ask(teacher):
        return await teacher.ask(MESSAGES, schema={"type": "object"})

    with pytest.raises(TeacherFailed, match=r"response_format\.\w+"):
        ask_as_data_gen(url, tmp_path, ask, structured_output=form)


def test_a_role_that_asks_for_more_tokens_than_there_are_is_told(server, tmp_path):
    _, url = server
    with pytest.raises(TeacherFailed, match="this server's longest is 256"):
        ask_as_data_gen(url, tmp_path, lambda teacher: teacher.ask(MESSAGES), max_tokens=8192)
