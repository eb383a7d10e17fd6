"""From the configured roles to endpoints; the built-in teacher is started as a child process."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_gen.config import Role, Simulated, Teachers
from data_gen.parent import end_with_parent
from data_gen.records import content_id
from data_gen.teacher import Endpoint, TeacherFailed, read_api_key

STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Endpoints:
    """One endpoint a role."""

    reasoner: Endpoint
    verifier: Endpoint
    rewriter: Endpoint


@contextmanager
def open_endpoints(teachers: Teachers) -> Iterator[Endpoints]:
    """Endpoints of all roles; simulated teachers, one for equal settings, run inside the block."""
    reasoner = teachers.reasoner
    roles = {
        "reasoner": reasoner,
        "verifier": reasoner if teachers.verifier is None else teachers.verifier,
        "rewriter": reasoner if teachers.rewriter is None else teachers.rewriter,
    }
    keys = {name: read_api_key(role.api_key_env) for name, role in roles.items()}
    urls: dict[str, str] = {}
    with ExitStack() as children:
        for role in roles.values():
            if role.simulated is not None and _name(role.simulated) not in urls:
                url = children.enter_context(run_simulated(arguments(role.simulated)))
                urls[_name(role.simulated)] = url
        yield Endpoints(
            **{name: _endpoint(name, role, urls, keys[name]) for name, role in roles.items()}
        )


def alias_of(role: Role) -> str:
    """What the journal knows the model by: for a simulated one, all that shapes its answers."""
    if role.simulated is None:
        return role.model
    bank = hashlib.sha256(role.simulated.bank.read_bytes()).hexdigest()
    return f"simulated-{content_id({**_shaping(role.simulated), 'bank': bank})}"


def arguments(simulated: Simulated) -> list[str]:
    """The command line of the simulated teacher; what is null is left to its defaults."""
    options = {
        "--error-reasoning": simulated.error_reasoning,
        "--error-strategy": simulated.error_strategy,
        "--error-rewrite": simulated.error_rewrite,
        "--error-filter": simulated.error_filter,
        "--error-reformat": simulated.error_reformat,
        "--verifier-false-positive": simulated.verifier_false_positive,
        "--verifier-false-negative": simulated.verifier_false_negative,
        "--fault-429": simulated.fault_429,
        "--fault-500": simulated.fault_500,
        "--fault-timeout": simulated.fault_timeout,
        "--fault-json": simulated.fault_json,
        "--stall-seconds": simulated.stall_seconds,
        "--retry-after-seconds": simulated.retry_after_seconds,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [f"--bank={simulated.bank}", f"--seed={simulated.seed}", *given]


@contextmanager
def run_simulated(options: list[str]) -> Iterator[str]:
    """Run the simulated teacher on a free port; yields its base URL, stops it on the way out."""
    command = [sys.executable, "-m", "data_gen.simulated_teacher", "--port=0", *options]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(end_with_parent, os.getpid()),
        start_new_session=True,  # ctrl-c is the parent's to handle
    )
    try:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        if not line.strip():
            said = child.stderr.read().strip().splitlines()
            why = said[-1] if said else "it printed no address"
            if child.wait() == 2:
                raise ValueError(why)
            raise TeacherFailed(f"the simulated teacher did not start: {why}")
        yield json.loads(line)["base_url"]
    finally:
        _stop(child)


def _stop(child: "subprocess.Popen[str]") -> None:
    child.terminate()
    try:
        child.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _endpoint(name: str, role: Role, urls: dict[str, str], api_key: str) -> Endpoint:
    url = role.base_url if role.simulated is None else urls[_name(role.simulated)]
    assert url is not None
    return Endpoint(
        role=name,
        base_url=url,
        alias=alias_of(role),
        model=role.model,
        temperature=role.temperature,
        max_tokens=role.max_tokens,
        timeout=role.timeout,
        seed=role.seed,
        api_key=api_key,
    )


def _name(simulated: Simulated) -> str:
    return simulated.model_dump_json()


def _shaping(simulated: Simulated) -> dict[str, Any]:
    """The settings that change an answer, not those that only delay it."""
    transport = {"fault_429", "fault_500", "fault_timeout", "stall_seconds", "retry_after_seconds"}
    return simulated.model_dump(mode="json", exclude={"bank", *transport})
