"""From the configured roles to endpoints; the built-in teacher is started as a child process."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_gen.asking import BatchSettings, Endpoint, TeacherFailed
from data_gen.config import NetworkSettings, Prices, Role, Simulated, Teachers
from data_gen.network import Network, read_key_file, read_variable
from data_gen.parent import end_with_parent
from data_gen.prices import PriceList, Rate
from data_gen.records import content_id

STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Endpoints:
    """One endpoint a role."""

    reasoner: Endpoint
    verifier: Endpoint
    rewriter: Endpoint


@contextmanager
def open_endpoints(teachers: Teachers, prices: Prices | None = None) -> Iterator[Endpoints]:
    """Endpoints of all roles; simulated teachers, one for equal settings, run inside the block."""
    with open_roles(roles_of(teachers), prices) as endpoints:
        yield Endpoints(**endpoints)


def roles_of(teachers: Teachers) -> dict[str, Role]:
    """The three roles by name; one left out is the reasoner's."""
    reasoner = teachers.reasoner
    return {
        "reasoner": reasoner,
        "verifier": reasoner if teachers.verifier is None else teachers.verifier,
        "rewriter": reasoner if teachers.rewriter is None else teachers.rewriter,
    }


@contextmanager
def open_roles(
    roles: Mapping[str, Role], prices: Prices | None = None
) -> Iterator[dict[str, Endpoint]]:
    """An endpoint for every role, by name; simulated teachers run inside the block."""
    listed = price_list(Prices() if prices is None else prices)
    secrets = {name: read_secrets(role) for name, role in roles.items()}
    urls: dict[str, str] = {}
    with ExitStack() as children:
        for role in roles.values():
            if role.simulated is not None and _name(role.simulated) not in urls:
                url = children.enter_context(run_simulated(arguments(role.simulated)))
                urls[_name(role.simulated)] = url
        yield {
            name: _endpoint(name, role, urls, secrets[name], listed) for name, role in roles.items()
        }


def price_list(prices: Prices) -> PriceList:
    """The price table as rates."""
    rates = {
        model: Rate(
            price.input,
            price.output,
            price.input if price.cached_input is None else price.cached_input,
        )
        for model, price in prices.models.items()
    }
    return PriceList(prices.currency, rates, prices.batch_share)


def check_prices(roles: Iterable[Role], prices: Prices, max_cost: float | None) -> None:
    """A cap in money needs a price for every model that may be asked."""
    missing = sorted({role.model for role in roles} - set(prices.models))
    if max_cost is not None and missing:
        raise ValueError(
            f"limits.max_cost={max_cost:g} needs a price for every model; "
            f"prices.models lacks {', '.join(missing)}"
        )


def open_network(settings: NetworkSettings, roles: Iterable[Role]) -> Network:
    """The network of a run; every endpoint is checked against it before any is asked."""
    login = None
    if settings.proxy_env is not None:
        login = read_variable("network.proxy_env", settings.proxy_env)
    network = Network(
        allow=None if settings.allow is None else tuple(settings.allow),
        offline=settings.offline,
        ca_bundle=settings.ca_bundle,
        client_certificate=settings.client_certificate,
        client_key=settings.client_key,
        proxy=settings.proxy,
        proxy_login=login,
    )
    network.check_all(url for role in roles for url in role.urls)
    return network


def read_secrets(role: Role) -> dict[str, str]:
    """The headers of a role whose values are secret, from where its settings say they are."""
    headers = {
        name: read_variable(f"headers_env.{name}", variable)
        for name, variable in role.headers_env.items()
    }
    key = None
    if role.api_key_env is not None:
        key = read_variable("api_key_env", role.api_key_env)
    elif role.api_key_file is not None:
        key = read_key_file(role.api_key_file)
    if key is not None:
        bearer = role.api_key_header.lower() == "authorization"
        headers[role.api_key_header] = f"Bearer {key}" if bearer else key
    return headers


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
        "--fault-cut": simulated.fault_cut,
        "--latency-seconds": simulated.latency_seconds,
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


def _endpoint(
    name: str, role: Role, urls: dict[str, str], secrets: dict[str, str], prices: PriceList
) -> Endpoint:
    own = role.urls if role.simulated is None else [urls[_name(role.simulated)]]
    batch = role.batch
    return Endpoint(
        role=name,
        base_urls=tuple(url.rstrip("/") for url in own),
        alias=alias_of(role),
        revision=role.revision,
        model=role.model,
        temperature=role.temperature,
        top_p=role.top_p,
        max_tokens=role.max_tokens,
        limit_field=role.max_tokens_field,
        structured_output=role.structured_output,
        timeout=role.timeout,
        seed=role.seed,
        headers={**role.headers, **secrets},
        query={} if role.api_version is None else {"api-version": role.api_version},
        secrets=tuple(value.removeprefix("Bearer ") for value in secrets.values()),
        requests_per_minute=role.requests_per_minute,
        tokens_per_minute=role.tokens_per_minute,
        rate=prices.rate(role.model, batch=batch is not None),
        batch=None
        if batch is None
        else BatchSettings(
            batch.count, batch.seconds, batch.poll_seconds, batch.window, batch.list_lag_seconds
        ),
    )


def _name(simulated: Simulated) -> str:
    return simulated.model_dump_json()


def _shaping(simulated: Simulated) -> dict[str, Any]:
    """The settings that change an answer, not those that only delay it."""
    transport = {"fault_429", "fault_500", "fault_timeout", "fault_cut"}
    transport |= {"latency_seconds", "stall_seconds", "retry_after_seconds"}
    return simulated.model_dump(mode="json", exclude={"bank", *transport})
