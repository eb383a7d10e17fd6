"""What a teacher call costs the client: CPU and calls a second, beside other clients.

    python benchmarks/data_gen_throughput.py --peer-python OTHER_VENV/bin/python

One simulated teacher (a process of its own, with a fixed latency) is asked the same prompts by each
client in turn, each in a process of its own: this project's engine (journal, budget, limits and
all), aiohttp and `openai` alone, and distilabel, which needs an environment of its own
(`pip install distilabel`). Every client runs twice, with a few calls and with many; the difference
is free of start-up, and that is what is printed. CPU counts the client's children too.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = (
    "You solve a problem by reasoning step by step. Reply with one JSON object "
    '{{"CoT": [...]}}. Each element is {{"action": "Inner Thinking", "title": "...", "content": '
    '"..."}}, then one {{"action": "Final Conclusion", "content": "..."}}, then one '
    '{{"action": "Verification", "content": "..."}}.\n\nQuestion: Zelt for a child of {n} kg with '
    "fever. Which single dose?"
)
SETTINGS = {"temperature": 0.7, "max_tokens": 512}


def prompts(first: int, count: int) -> list[str]:
    return [PROMPT.format(n=n) for n in range(first, first + count)]


# --- clients: each answers `count` prompts, at most `at_once` in flight -----------------------


async def ask_engine(url: str, asked: list[str], at_once: int) -> None:
    from data_gen.budget import Budget
    from data_gen.journal import Journal
    from data_gen.progress import map_concurrently
    from data_gen.teacher import Endpoint, Patience, Teacher
    from data_gen.transport import open_wire

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.sqlite")
        place = Endpoint("reasoner", (url,), "m", "m", timeout=60, seed=0, **SETTINGS)
        budget = Budget(at_once, ledger=journal)
        async with open_wire() as wire:
            teacher = Teacher(place, wire, journal, budget, Patience(6, 0.5, 30))

            async def ask(prompt: str) -> None:
                await teacher.ask([{"role": "user", "content": prompt}])

            await map_concurrently(asked, ask, at_once + at_once // 4, "engine")
        await journal.drain()
        journal.close()


async def ask_aiohttp(url: str, asked: list[str], at_once: int) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str) -> None:
            body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **SETTINGS}
            async with session.post(f"{url}/chat/completions", json=body) as reply:
                (await reply.json())["choices"][0]["message"]["content"]

        await _all(asked, ask, at_once)


async def ask_openai(url: str, asked: list[str], at_once: int) -> None:
    import openai

    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=http
    ) as client:

        async def ask(prompt: str) -> None:
            messages: Any = [{"role": "user", "content": prompt}]
            await client.chat.completions.create(model="m", messages=messages, **SETTINGS)

        await _all(asked, ask, at_once)


async def _all(asked: list[str], ask: Any, at_once: int) -> None:
    queue = iter(asked)

    async def worker() -> None:
        for prompt in queue:
            await ask(prompt)

    await asyncio.gather(*(worker() for _ in range(at_once)))


def ask_distilabel(url: str, asked: list[str], at_once: int) -> None:
    from distilabel.models import OpenAILLM  # type: ignore[import-not-found]
    from distilabel.pipeline import Pipeline  # type: ignore[import-not-found]
    from distilabel.steps import LoadDataFromDicts  # type: ignore[import-not-found]
    from distilabel.steps.tasks import TextGeneration  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as cache:
        with Pipeline(name="throughput", cache_dir=cache) as pipeline:
            rows = LoadDataFromDicts(
                data=[{"instruction": prompt} for prompt in asked], batch_size=at_once
            )
            llm = OpenAILLM(
                base_url=url,
                api_key="none",  # type: ignore[arg-type]
                model="m",
                generation_kwargs={"temperature": 0.7, "max_new_tokens": 512},
            )
            rows.connect(TextGeneration(llm=llm, input_batch_size=at_once))
        made = pipeline.run(use_cache=False)
        texts = made["default"]["train"]["generation"]
        assert len(texts) == len(asked) and all(texts), "distilabel lost answers"


CLIENTS = {
    "engine": ask_engine,
    "aiohttp": ask_aiohttp,
    "openai": ask_openai,
    "distilabel": ask_distilabel,
}


def measure_here(client: str, url: str, first: int, count: int, at_once: int) -> dict[str, float]:
    """Run one client in this process: wall and CPU seconds, its children's included."""
    asked = prompts(first, count)
    start, cpu = time.monotonic(), _cpu()
    if client == "distilabel":
        ask_distilabel(url, asked, at_once)
    else:
        asyncio.run(CLIENTS[client](url, asked, at_once))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": time.monotonic() - start, "cpu": _cpu() - cpu, "rss_mb": most}


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- the comparison ---------------------------------------------------------------------------


def measure(
    python: str, client: str, url: str, few: int, many: int, at_once: int
) -> dict[str, float]:
    """CPU milliseconds a call and calls a second, start-up taken out."""
    runs = []
    for count in (few, many):
        command = [python, __file__, "--child", client, "--url", url]
        command += [f"--calls={count}", f"--at-once={at_once}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{client}: {done.stderr.strip().splitlines()[-1:]}")
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    calls = many - few
    wall, cpu = (runs[1][name] - runs[0][name] for name in ("wall", "cpu"))
    return {
        "cpu_ms_per_call": 1000 * cpu / calls,
        "calls_per_second": calls / wall,
        "startup_cpu_s": runs[0]["cpu"] - few * cpu / calls,
        "wall_s_whole": runs[1]["wall"],
        "calls_per_second_whole": many / runs[1]["wall"],
        "rss_mb": runs[1]["rss_mb"],
    }


def describe_run(given: argparse.Namespace) -> dict[str, Any]:
    """Date, hardware, versions and settings of a comparison."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pythons: dict[str, tuple[str, ...]] = {sys.executable: ("aiohttp", "openai")}
    if given.peer_python is not None:
        pythons[given.peer_python] = ("distilabel",)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(python, name) for python, of in pythons.items() for name in of},
        "calls": given.calls,
        "at_once": given.at_once,
        "latency_s": given.latency,
    }


def _version(python: str, package: str) -> str:
    program = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    return done.stdout.strip() or "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", help="interpreter of an environment with distilabel")
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--few", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--clients", nargs="*", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--out", type=Path, help="also append what is printed to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(measure_here(given.child, given.url, 0, given.calls, given.at_once)))
        return
    from data_gen.endpoints import run_simulated

    def tell(told: dict[str, Any]) -> None:
        print(json.dumps(told), flush=True)
        if given.out is not None:
            with open(given.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")

    tell(describe_run(given))
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "bank.jsonl"
        bank.write_text("")
        options = [f"--bank={bank}", f"--latency-seconds={given.latency}"]
        with run_simulated(options) as url:
            for client in given.clients:
                python = given.peer_python if client == "distilabel" else sys.executable
                if python is None:
                    continue
                found = measure(python, client, url, given.few, given.calls, given.at_once)
                tell({"client": client, **{name: round(value, 3) for name, value in found.items()}})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
