"""The engine of a run: journal, budget, connections, a teacher for every role, opened together."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from data_gen.asking import Patience
from data_gen.budget import Budget, Caps
from data_gen.config import Config, Retries, Role
from data_gen.endpoints import check_prices, open_network, open_roles, price_list, roles_of
from data_gen.journal import open_journal
from data_gen.network import go_offline
from data_gen.progress import snapshots_in
from data_gen.teacher import Teacher
from data_gen.transport import open_wire

JOURNAL = "journal.sqlite"


@asynccontextmanager
async def open_teachers(
    config: Config, roles: Mapping[str, Role]
) -> AsyncIterator[dict[str, Teacher]]:
    """A teacher for every role, by name; on the way out what has arrived is made durable.

    Hosts, keys and prices are checked before anything is started or sent.
    """
    limits = config.limits
    check_prices(roles.values(), config.prices, limits.max_cost)
    network = open_network(config.network, roles.values())
    if network.offline:
        go_offline()
    with open_roles(roles, config.prices) as endpoints:
        journal = await open_journal(config.out / JOURNAL)
        try:
            caps = Caps(
                limits.max_calls, limits.max_tokens, limits.max_cost, config.prices.currency
            )
            spent = journal.spent(price_list(config.prices))
            budget = Budget(config.concurrency, caps, spent, journal)
            patience = patience_of(config.retries)
            async with open_wire(network) as wire:
                teachers = {
                    name: Teacher(endpoint, wire, journal, budget, patience)
                    for name, endpoint in endpoints.items()
                }
                try:
                    with snapshots_in(config.out):
                        yield teachers
                finally:
                    for teacher in teachers.values():
                        await teacher.close()
        finally:
            await journal.drain()
            journal.close()


def patience_of(retries: Retries) -> Patience:
    """The patience that the settings ask for."""
    return Patience(
        attempts=retries.attempts,
        first_wait=retries.first_wait,
        longest_wait=retries.longest_wait,
        busy_seconds=retries.busy_seconds,
        repairs=retries.repairs,
    )


def workers_of(config: Config) -> int:
    """How many items are worked on at once.

    A few more than requests may be in flight, so that a place is not empty while the answer that
    was in it is made durable; as many as a batch holds where calls go out in batches.
    """
    roles = roles_of(config.teacher).values()
    batches = [role.batch.count for role in roles if role.batch is not None]
    return max([config.concurrency + config.concurrency // 4, *batches])
