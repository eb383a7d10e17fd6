"""The simulated teacher, spoken to over HTTP with the real client."""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from data_gen.formulary import FormularySettings, write_formulary
from data_gen.simulated_replies import Draw, agrees, outcome, think

PROMPTS = yaml.safe_load(
    (Path(__file__).parents[2] / "data_gen" / "prompts" / "en.yaml").read_text(encoding="utf-8")
)
STRATEGIES = ("explore", "backtrack", "verify_again", "correct")
NO_ERRORS = [
    *("--error-reasoning", "0", "--error-strategy", "0", "--error-rewrite", "0"),
    *("--error-filter", "0", "--error-reformat", "0"),
    *("--verifier-false-positive", "0", "--verifier-false-negative", "0"),
]
GENERIC = {
    "kind": "generic",
    "question": "A man has chest pain\nthat rises to the jaw. Which drug is best?",
    "open_question": "A man has chest pain that rises to the jaw. Which drug should he get first?",
    "answer": "Aspirin (325 mg)",
    "options": {"A": "Warfarin", "B": "Aspirin (325 mg)", "C": "Iron", "D": "Vitamin B12"},
}


def render(kind: str, **values: str) -> str:
    text = PROMPTS[kind]
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def render_trace(steps: list[dict[str, str]]) -> str:
    titles = {"Final Conclusion": "Conclusion", "Verification": "Verification"}
    return "\n\n".join(
        f"### {step['title'] if step['action'] == 'Inner Thinking' else titles[step['action']]}\n"
        f"{step['content']}"
        for step in steps
    )


class Client:
    """The OpenAI client, without retries, and the few calls the tests make."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.api = openai.OpenAI(
            base_url=base_url,
            api_key="none",
            max_retries=0,
            timeout=20,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def ask(self, prompt: str, *, seed: int = 0, after: list[dict] | None = None) -> str:
        messages: Any = [{"role": "user", "content": prompt}, *(after or [])]
        reply = self.api.chat.completions.create(model="m", messages=messages, seed=seed)
        assert reply.choices[0].finish_reason == "stop"
        return reply.choices[0].message.content or ""

    def steps(self, kind: str, question: str, **values: Any) -> list[dict[str, str]]:
        previous = values.pop("previous", "")
        prompt = render(kind, question=question, previous=previous)
        return json.loads(self.ask(prompt, **values))["CoT"]

    def stats(self) -> dict:
        return httpx.get(self.base_url.removesuffix("/v1") + "/stats", trust_env=False).json()


def conclusion(steps: list[dict[str, str]]) -> str:
    return [step["content"] for step in steps if step["action"] == "Final Conclusion"][-1]


def lines(steps: list[dict[str, str]]) -> list[str]:
    return [step["content"] for step in steps if step["action"] == "Inner Thinking"]


@contextmanager
def serving(bank: Path, *options: str) -> Iterator[Client]:
    process = subprocess.Popen(
        [sys.executable, "-m", "data_gen.simulated_teacher", "--bank", str(bank), *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Client(json.loads(process.stdout.readline())["base_url"])
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_formulary(FormularySettings(seed=5), tmp_path_factory.mktemp("f"))["teacher_bank"]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(GENERIC) + "\n")
    return path


@pytest.fixture(scope="session")
def bank(bank_file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bank_file.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def exact(bank_file: Path) -> Iterator[Client]:
    """A teacher that makes no mistakes."""
    with serving(bank_file, *NO_ERRORS) as client:
        yield client


@pytest.fixture(scope="session")
def human(bank_file: Path) -> Iterator[Client]:
    """A teacher with the default error rates."""
    with serving(bank_file) as client:
        yield client


@pytest.fixture(scope="session")
def always_wrong(bank_file: Path) -> Iterator[Client]:
    """A teacher that slips every time."""
    wrong = [*NO_ERRORS]
    wrong[1] = wrong[3] = wrong[5] = wrong[7] = wrong[9] = wrong[11] = wrong[13] = "1"
    with serving(bank_file, *wrong) as client:
        yield client


def of_kind(bank: list[dict[str, Any]], kind: str, count: int) -> list[dict[str, Any]]:
    return [record for record in bank if record["kind"] == kind][:count]


# --- each kind of prompt ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dose", "recall", "generic"])
def test_filter_and_reformat_know_the_multiple_choice_question(exact, bank, kind):
    for record in of_kind(bank, kind, 5):
        options = "\n".join(f"{letter}. {text}" for letter, text in record["options"].items())
        values = {"question": record["question"], "options": options, "answer": record["answer"]}
        assert exact.ask(render("filter", **values)) == "Pass"
        assert json.loads(exact.ask(render("reformat", **values))) == {
            "Open-ended Verifiable Question": record["open_question"],
            "Ground-True Answer": record["answer"],
        }


@pytest.mark.parametrize("kind", ["initial_cot", *STRATEGIES])
def test_reasoning_has_the_published_form_and_ends_in_the_answer(exact, bank, kind):
    for record in [*of_kind(bank, "dose", 30), *of_kind(bank, "recall", 10), bank[-1]]:
        steps = exact.steps(kind, record["open_question"])
        actions = [step["action"] for step in steps]
        first = [] if kind == "initial_cot" else ["Verification"]
        thinking = ["Inner Thinking"] * (len(actions) - 2 - len(first))
        assert actions == [*first, *thinking, "Final Conclusion", "Verification"]
        assert len(thinking) >= 2
        assert all("title" in step for step in steps if step["action"] == "Inner Thinking")
        assert conclusion(steps) == record["answer"]
        assert lines(steps) == think(record, wrong=False, draw=Draw(0, "")).lines


def test_the_verifier_compares_what_is_said(exact):
    for said, reference, same in (
        ("80 mg", "80 mg", True),
        ("The answer is 80 mg.", "80 mg", True),
        ("180 mg", "80 mg", False),
        ("80 mg per dose", "80 mg", True),
        ("do not give", "80 mg", False),
        ("do not give 80 mg", "80 mg", False),
        ("Reply True.", "80 mg", False),
        ("7 mg per kg", "7 mg", False),
        ("aspirin and heparin", "aspirin", False),
        ("< 0.05", "> 0.05", False),
        ("Do not give it.", "do not give", True),
    ):
        reply = exact.ask(render("verify", conclusion=said, answer=reference))
        assert reply == str(same), (said, reference)
        assert agrees(said, reference) == same


def test_rewriting_and_answering_keep_the_outcome_of_a_first_attempt(exact, bank):
    for record in [*of_kind(bank, "dose", 40), *of_kind(bank, "recall", 20), bank[-1]]:
        question = record["open_question"]
        steps = exact.steps("initial_cot", question)
        values = {"question": question, "trace": render_trace(steps)}
        text = json.loads(exact.ask(render("natural_reasoning", **values)))["NaturalReasoning"]
        assert text.split("\n") == lines(steps)
        assert "\n" in text
        response = exact.ask(render("final_response", question=question, reasoning=text))
        assert response == record["answer"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rewriting_keeps_only_the_last_attempt_and_says_that_it_checked_again(
    exact, always_wrong, bank, strategy
):
    for record in [*of_kind(bank, "dose", 10), *of_kind(bank, "recall", 5), bank[-1]]:
        question = record["open_question"]
        first = always_wrong.steps("initial_cot", question)
        second = exact.steps(strategy, question, previous=json.dumps(first[:-1]))
        values = {"question": question, "trace": render_trace([*first[:-1], *second])}
        text = json.loads(exact.ask(render("natural_reasoning", **values)))["NaturalReasoning"]
        assert text.split("\n") == ["Wait, check again.", *lines(second)]
        response = exact.ask(render("final_response", question=question, reasoning=text))
        assert response == record["answer"]


def test_a_wrong_trace_is_rewritten_with_its_mistake(exact, always_wrong, bank):
    for record in of_kind(bank, "dose", 40):
        question = record["open_question"]
        steps = always_wrong.steps("initial_cot", question)
        values = {"question": question, "trace": render_trace(steps)}
        text = json.loads(exact.ask(render("natural_reasoning", **values)))["NaturalReasoning"]
        response = exact.ask(render("final_response", question=question, reasoning=text))
        assert response == conclusion(steps) != record["answer"]


def test_a_request_for_repair_gets_the_reply_of_the_prompt_before_it(human, bank):
    for record in of_kind(bank, "dose", 10):
        prompt = render("initial_cot", question=record["open_question"])
        broken = {"role": "assistant", "content": '{"CoT": ['}
        repair = {"role": "user", "content": render("repair", error="not JSON: {")}
        first = human.ask(prompt)
        assert human.ask(prompt, after=[broken, repair]) == first
        assert human.ask(prompt, after=[broken, repair, broken, repair]) == first


def test_an_unknown_problem_gets_a_wrong_answer_and_no_error(exact, bank):
    before = exact.stats()["unknown_problems"]
    asked = 0
    for record in of_kind(bank, "dose", 20):
        question = record["open_question"].replace(record["drug"]["name"], "Unheard")
        for kind in ("initial_cot", "correct"):
            steps = exact.steps(kind, question)
            assert conclusion(steps) != record["answer"]
            assert lines(steps)
            asked += 1
    assert conclusion(exact.steps("initial_cot", "Why is the sky blue?"))
    assert exact.stats()["unknown_problems"] == before + asked + 1


def test_a_question_is_found_whatever_its_white_space(exact):
    question = GENERIC["open_question"].replace(" chest ", " \n chest  ")
    assert conclusion(exact.steps("initial_cot", question)) == GENERIC["answer"]


def test_a_slip_in_a_generic_question_names_another_option(always_wrong):
    seen = {
        conclusion(always_wrong.steps("initial_cot", GENERIC["open_question"], seed=seed))
        for seed in range(30)
    }
    assert seen == {"Warfarin", "Iron", "Vitamin B12"}


# --- error rates --------------------------------------------------------------------------------


def share_of(values: list[bool]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("kind", "rate"), [("initial_cot", 0.3), ("explore", 0.2)])
def test_the_share_of_wrong_conclusions_is_the_rate_set(human, bank, kind, rate):
    wrong = [
        conclusion(human.steps(kind, record["open_question"])) != record["answer"]
        for record in bank[:500]
    ]
    assert abs(share_of(wrong) - rate) < 4 * (rate * (1 - rate) / 500) ** 0.5


def test_the_request_seed_draws_a_new_answer(human, bank):
    question = of_kind(bank, "dose", 1)[0]["open_question"]
    answers = Counter(
        conclusion(human.steps("initial_cot", question, seed=seed)) for seed in range(40)
    )
    assert len(answers) > 1
    assert human.steps("initial_cot", question, seed=7) == human.steps(
        "initial_cot", question, seed=7
    )


def test_verifier_errors_have_the_rates_set(human):
    false_negatives, false_positives = [], []
    for n in range(500):
        right = human.ask(render("verify", conclusion=f"{n} mg", answer=f"{n} mg"))
        wrong = human.ask(render("verify", conclusion=f"{n + 1} mg", answer=f"{n} mg"))
        false_negatives.append(right == "False")
        false_positives.append(wrong == "True")
    assert 0.02 < share_of(false_negatives) < 0.09
    assert 0.005 < share_of(false_positives) < 0.06


def test_rates_of_one_make_every_reply_wrong(always_wrong, bank):
    for record in [*of_kind(bank, "dose", 20), *of_kind(bank, "recall", 10), bank[-1]]:
        question = record["open_question"]
        for kind in ("initial_cot", *STRATEGIES):
            steps = always_wrong.steps(kind, question)
            assert conclusion(steps) != record["answer"]
            assert outcome("\n".join(lines(steps))) == conclusion(steps)
        values = {"question": record["question"], "options": "", "answer": record["answer"]}
        assert always_wrong.ask(render("filter", **values)) != "Pass"
        problem = json.loads(always_wrong.ask(render("reformat", **values)))
        assert problem["Ground-True Answer"] != record["answer"]
    assert always_wrong.ask(render("verify", conclusion="80 mg", answer="80 mg")) == "False"
    assert always_wrong.ask(render("verify", conclusion="8 mg", answer="80 mg")) == "True"


def test_an_error_in_rewriting_changes_the_outcome(exact, always_wrong, bank):
    for record in [*of_kind(bank, "dose", 40), *of_kind(bank, "recall", 20), bank[-1]]:
        question = record["open_question"]
        trace = render_trace(exact.steps("initial_cot", question))
        prompt = render("natural_reasoning", question=question, trace=trace)
        text = json.loads(always_wrong.ask(prompt))["NaturalReasoning"]
        response = exact.ask(render("final_response", question=question, reasoning=text))
        assert "\n" in text and response and response != record["answer"]


# --- determinism --------------------------------------------------------------------------------


async def ask_all(base_url: str, prompts: list[str]) -> dict[str, str]:
    """Reply or status of each prompt, 32 at a time, in the order given."""
    gate = asyncio.Semaphore(32)
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, timeout=30, http_client=http
    ) as api:

        async def ask(prompt: str) -> str:
            async with gate:
                try:
                    reply = await api.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": prompt}]
                    )
                except openai.APIStatusError as error:
                    return str(error.status_code)
                return reply.choices[0].message.content or ""

        replies = await asyncio.gather(*map(ask, prompts))
    return dict(zip(prompts, replies, strict=True))


def test_answers_and_faults_do_not_depend_on_the_order_of_arrival(bank_file, bank):
    prompts = [
        render(kind, question=record["open_question"], previous="")
        for record in bank[:100]
        for kind in ("initial_cot", "backtrack")
    ]
    shuffled = random.Random(0).sample(prompts, len(prompts))
    faults = ("--fault-429", "0.1", "--fault-500", "0.1", "--fault-json", "0.1")
    replies = []
    for order in (prompts, shuffled):
        with serving(bank_file, *faults) as client:
            replies.append(asyncio.run(ask_all(client.base_url, order)))
    assert replies[0] == replies[1]
    assert {"429", "500"} < set(replies[0].values())
    with serving(bank_file, *faults, "--seed", "1") as client:
        assert asyncio.run(ask_all(client.base_url, prompts)) != replies[0]


# --- faults -------------------------------------------------------------------------------------


def until_answered(client: Client, prompt: str, errors: Counter) -> int:
    """Ask until an answer comes; the number of tries."""
    for attempt in range(1, 60):
        try:
            client.ask(prompt)
        except openai.RateLimitError as error:
            errors["429"] += 1
            assert error.response.headers["retry-after"] == "0.25"
        except openai.InternalServerError as error:
            errors["500"] += 1
            assert error.status_code == 500
        else:
            return attempt
    raise AssertionError("no try succeeded")


def test_refused_calls_have_the_rates_set_and_a_retry_succeeds(bank_file, bank):
    options = ("--fault-429", "0.2", "--fault-500", "0.1", "--retry-after-seconds", "0.25")
    errors: Counter[str] = Counter()
    with serving(bank_file, *options) as client:
        prompts = [render("initial_cot", question=r["open_question"]) for r in bank[:300]]
        tries = sum(until_answered(client, prompt, errors) for prompt in prompts)
        stats = client.stats()
    assert abs(errors["429"] / tries - 0.2) < 0.08
    assert abs(errors["500"] / tries - 0.08) < 0.06
    assert stats["faults"] == dict(errors)
    assert stats["calls"] == stats["calls_by_kind"]["initial_cot"] == tries


def test_malformed_json_comes_only_where_asked_and_is_mended_by_asking_again(bank_file, bank):
    broken = 0
    with serving(bank_file, *NO_ERRORS, "--fault-json", "0.5") as client:
        for record in bank[:60]:
            prompt = render("initial_cot", question=record["open_question"])
            replies = [client.ask(prompt) for _ in range(12)]
            readable = [reply for reply in replies if is_json(reply)]
            broken += len(replies) - len(readable)
            assert len(set(readable)) == 1
            same = {"conclusion": record["answer"], "answer": record["answer"]}
            assert client.ask(render("verify", **same)) == "True"
        assert client.stats()["faults"] == {"malformed_json": broken}
    assert abs(broken / 720 - 0.5) < 0.1


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_no_fault_is_injected_unless_asked(human, bank):
    for record in bank[:50]:
        human.steps("initial_cot", record["open_question"])
    assert human.stats()["faults"] == {}


def test_a_stalled_call_times_out_and_a_retry_succeeds(bank_file, bank):
    slow = 0
    with serving(bank_file, "--fault-timeout", "0.3", "--stall-seconds", "60") as client:
        hasty = client.api.with_options(timeout=0.5)
        for record in bank[:8]:
            prompt = render("initial_cot", question=record["open_question"])
            for _ in range(30):
                try:
                    hasty.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": prompt}]
                    )
                    break
                except openai.APITimeoutError:
                    slow += 1
            else:
                raise AssertionError("no try succeeded")
        assert client.stats()["faults"] == {"timeout": slow}
    assert slow > 0


def test_a_cut_connection_ends_in_the_middle_of_an_answer_and_a_retry_succeeds(bank_file, bank):
    cut = 0
    with serving(bank_file, "--fault-cut", "0.4") as client:
        for record in bank[:12]:
            prompt = render("initial_cot", question=record["open_question"])
            for _ in range(30):
                try:
                    client.ask(prompt)
                    break
                except openai.APIConnectionError as error:
                    assert "incomplete" in str(error.__cause__) or "closed" in str(error.__cause__)
                    cut += 1
            else:
                raise AssertionError("no try succeeded")
        told = client.stats()
    assert cut > 0 and told["faults"] == {"cut": cut}
    assert told["completed"] == 12


def test_every_answer_comes_after_the_latency_set(bank_file, bank):
    with serving(bank_file, "--latency-seconds", "0.3") as client:
        prompts = [render("initial_cot", question=r["open_question"]) for r in bank[:20]]
        start = time.monotonic()
        asyncio.run(ask_all(client.base_url, prompts))
        seconds = time.monotonic() - start
    assert 0.3 <= seconds < 2.0


def test_completed_calls_and_their_tokens_are_counted_and_named(bank_file, bank):
    used: Counter[str] = Counter()
    names = set()
    with serving(bank_file, "--fault-500", "0.3") as client:
        for record in bank[:20]:
            prompt = render("initial_cot", question=record["open_question"])
            messages: Any = [{"role": "user", "content": prompt}]
            try:
                raw = client.api.chat.completions.with_raw_response.create(
                    model="m", messages=messages
                )
            except openai.InternalServerError:
                continue
            usage = raw.parse().usage
            assert usage is not None
            used.update(prompt_tokens=usage.prompt_tokens, total_tokens=usage.total_tokens)
            used.update(completion_tokens=usage.completion_tokens)
            names.add(raw.headers["x-request-id"])
        told = client.stats()
    assert told["tokens"] == dict(used)
    assert 0 < told["completed"] == len(names) < 20


# --- the HTTP surface ---------------------------------------------------------------------------


def test_completions_have_ids_usage_and_a_length_limit(exact, bank):
    prompt = render("initial_cot", question=bank[0]["open_question"])
    messages: Any = [{"role": "user", "content": prompt}]
    reply = exact.api.chat.completions.create(model="m", messages=messages)
    assert reply.id.startswith("chatcmpl-") and reply.usage is not None
    assert reply.usage.prompt_tokens == round(1.3 * len(prompt.split()))
    assert reply.usage.completion_tokens > 10
    short = exact.api.chat.completions.create(model="m", messages=messages, max_tokens=10)
    assert short.choices[0].finish_reason == "length" and short.usage is not None
    assert short.usage.completion_tokens <= 10
    assert [model.id for model in exact.api.models.list()] == ["simulated-teacher"]
    health = httpx.get(exact.base_url.removesuffix("/v1") + "/health", trust_env=False)
    assert health.status_code == 200 and health.json()["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 2}, "n=2 is not allowed; it should be 1"),
        ({"stream": True}, "stream=true is not allowed"),
        ({"messages": []}, "messages should be a list"),
        ({"messages": [{"role": "user"}]}, "messages[0] should have a role and a content"),
        ({"max_tokens": 0}, "max_tokens=0 is not allowed"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_the_reason(exact, change, message):
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **change}
    reply = httpx.post(f"{exact.base_url}/chat/completions", json=body, trust_env=False)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_gen.simulated_teacher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def bad_bank(tmp_path: Path, line: str) -> str:
    path = tmp_path / "bank.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    return str(path)


REFUSALS: dict[str, Callable[[Path, Path], list[str]]] = {
    "No such file": lambda tmp, _: ["--bank", str(tmp / "none.jsonl")],
    "--fault-429: 1.5 is not allowed; it should be from 0 to 1": lambda _, bank: [
        "--bank",
        str(bank),
        "--fault-429",
        "1.5",
    ],
    "--port: 70000 is not allowed": lambda _, bank: ["--bank", str(bank), "--port", "70000"],
    "the following arguments are required: --bank": lambda _, __: [],
    "line 2: not JSON": lambda tmp, _: ["--bank", bad_bank(tmp, "{")],
    "line 2: kind='x' is not allowed": lambda tmp, _: ["--bank", bad_bank(tmp, '{"kind": "x"}')],
    "line 2: question, open_question": lambda tmp, _: [
        "--bank",
        bad_bank(tmp, '{"kind": "generic"}'),
    ],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, bank_file, message):
    done = run_command(*REFUSALS[message](tmp_path, bank_file))
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line_and_exit_code_2(bank_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_command("--bank", str(bank_file), "--port", port)
    assert done.returncode == 2 and done.stdout == ""
    assert f"--port {port}: " in done.stderr and done.stderr.count("\n") == 1


def test_the_teacher_imports_nothing_of_the_pipeline():
    code = (
        "import sys, data_gen.simulated_teacher\n"
        "print(sorted(m for m in sys.modules if m.startswith(('data_gen.', 'openai', 'pydantic'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ("batches", "replies", "teacher")
    assert done.stdout.strip() == str([f"data_gen.simulated_{name}" for name in names])
