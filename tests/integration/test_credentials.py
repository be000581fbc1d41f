"""User names and passwords that are asked for: at every connect, once more when they are refused, once for all."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool import BackoffPolicy, ConfigurationError, ResilientPool
from resilient_pool.retry.backoff import RECONNECT_BACKOFF
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

PROMPT = BackoffPolicy(base=0.01, max_attempts=None, max_elapsed=60.0)


@pytest.fixture
async def roles(postgres: EmbeddedPostgres):
    """Two roles, as a secrets engine makes them, with their passwords."""
    made = {"v-app-1": "first!", "v-app-2": "second!"}
    async with postgres.admin() as admin:
        for name in made:
            await admin.execute(f'DROP ROLE IF EXISTS "{name}"')
    for name, password in made.items():
        await postgres.create_role(name, password)
    return list(made.items())


def where(server, **others):
    return {"host": server.host, "port": server.port, "database": "postgres", **others}


async def test_user_and_password_are_asked_for_together_at_every_connect(postgres, roles):
    """A secrets engine gives a role and its password, and another pair when the first one has expired."""
    answers = [*roles]

    async def lease():
        return answers.pop(0)

    async with ResilientPool(**where(postgres, credentials=lease)) as pool:
        assert await pool.fetchval("SELECT current_user") == "v-app-1"
        await pool.expire_connections()
        assert await pool.fetchval("SELECT current_user") == "v-app-2"


async def test_credentials_that_are_refused_are_asked_for_once_more(postgres, roles):
    """A plain function may be asked too; what the DSN says of the user does not count."""
    answers = [("v-app-1", "expired"), roles[1]]
    dsn = postgres.dsn().replace("postgres@", "nobody@")
    async with ResilientPool(dsn, credentials=lambda: answers.pop(0)) as pool:
        assert await pool.fetchval("SELECT current_user") == "v-app-2"


async def test_credentials_are_asked_for_once_more_when_their_user_is_locked(postgres, roles):
    """A secrets engine drops or locks the user whose time is up, and the server says nothing of a password then."""
    async with postgres.admin() as admin:
        await admin.execute('ALTER ROLE "v-app-1" NOLOGIN')
    answers = list(roles)
    async with ResilientPool(**where(postgres, credentials=lambda: answers.pop(0))) as pool:
        assert await pool.fetchval("SELECT current_user") == "v-app-2"


async def test_other_credentials_may_be_set_for_a_pool(postgres, roles):
    """`set_connect_args` takes them as well."""
    async with ResilientPool(postgres.dsn()) as pool:
        pool.set_connect_args(**where(postgres, credentials=lambda: roles[0]))
        assert await pool.fetchval("SELECT current_user") == "v-app-1"


async def test_connections_that_are_opened_at_once_share_one_question(postgres, roles):
    """A provider of tokens may limit how often it is asked."""
    asked = []

    async def lease():
        asked.append(1)
        await asyncio.sleep(0)
        return roles[0]

    async with ResilientPool(**where(postgres, credentials=lease)) as pool:
        links = await asyncio.gather(*(pool._connector.open(None) for _ in range(5)))
        assert len(asked) == 1
        links += await asyncio.gather(*(pool._connector.open(None) for _ in range(5)))
        assert len(asked) == 2
        for link in links:
            link.terminate()


async def test_the_end_of_one_caller_is_not_the_end_of_the_others_question(postgres, roles):
    """Who is cancelled while the answer is awaited leaves it to the others; the last one takes it along."""
    started, answered, ended = asyncio.Event(), asyncio.Event(), []

    async def lease():
        started.set()
        try:
            await answered.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        ended.append("answered")
        return roles[0]

    pool = ResilientPool(**where(postgres, credentials=lease))
    credentials = pool._connector._credentials
    callers = [asyncio.create_task(credentials.get()) for _ in range(3)]
    await started.wait()
    callers[0].cancel()
    await asyncio.wait([callers[0]])
    answered.set()
    assert {login.user for login in await asyncio.gather(*callers[1:])} == {"v-app-1"}
    answered.clear()
    last = asyncio.create_task(credentials.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    last.cancel()
    with pytest.raises(asyncio.CancelledError):
        await last
    await asyncio.sleep(0)
    assert ended == ["answered", "cancelled"]


async def test_an_error_of_the_function_reaches_every_caller_and_is_judged(postgres, roles):
    """What the network says is waited out, anything else is final."""
    failures = [ConnectionRefusedError("the provider is away"), ConnectionRefusedError("still away")]

    async def lease():
        if failures:
            raise failures.pop()
        return roles[0]

    async with ResilientPool(**where(postgres, credentials=lease, reconnect=PROMPT)) as pool:
        answers = await asyncio.gather(*(pool.fetchval("SELECT current_user") for _ in range(3)))
        assert answers == ["v-app-1"] * 3

    async def broken():
        raise LookupError("no such lease")

    async with ResilientPool(**where(postgres, credentials=broken)) as pool:
        answers = await asyncio.gather(*(pool.fetch("SELECT 1") for _ in range(3)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["no such lease"] * 3


async def test_a_function_that_never_answers_is_cut_by_the_connect_timeout(postgres):
    """So the deadline holds."""

    async def never():
        await asyncio.Event().wait()

    async with ResilientPool(**where(postgres, credentials=never, timeout=0.2, deadline=0.5)) as pool:
        with pytest.raises(TimeoutError):
            await pool.fetch("SELECT 1")


@pytest.mark.parametrize(
    "answer",
    [
        "v-app-1:hunter2",
        ("v-app-1",),
        ("v", b"hunter2"),
        (b"v", "hunter2"),
        ("a", "hunter2", 1),
        ("v\0role\0x", "hunter2"),
        5,
    ],
)
async def test_an_answer_of_another_shape_is_refused_without_being_shown(postgres, answer):
    """The message says what is expected."""
    async with ResilientPool(**where(postgres, credentials=lambda: answer)) as pool:
        with pytest.raises(
            ConfigurationError, match=r"credentials= (must return a tuple|returns must be a str)"
        ) as caught:
            await pool.fetch("SELECT 1")
    assert "hunter2" not in str(caught.value)


def test_a_user_or_a_password_beside_credentials_is_refused():
    """Which of them counts would be a guess."""
    for name in ("user", "password", "passfile"):
        with pytest.raises(ConfigurationError, match=f"credentials= gives the user and the password: leave {name} out"):
            ResilientPool(credentials=lambda: ("u", "p"), **{name: "x"})


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("28P01", 'password authentication failed for user "app"'),
        ("28000", 'PAM authentication failed for user "app"'),
        ("08P01", "password authentication failed"),
        ("08P01", "SASL authentication failed"),
    ],
)
async def test_a_refusal_in_any_words_is_answered_with_another_token(postgres, code, text):
    """Servers say 28P01 or 28000, poolers 08P01."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.answer_with_error(code, text)
        asked = []

        async def token():
            asked.append(1)
            if len(asked) == 2:
                proxy.restore()
            return "token"

        async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, password=token) as pool:
            assert await pool.fetchval("SELECT 42") == 42
        assert len(asked) == 2


async def test_a_host_that_is_not_let_in_is_no_reason_to_ask_again(postgres):
    """`no pg_hba.conf entry` says nothing of the password."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.answer_with_error("28000", 'no pg_hba.conf entry for host "1.2.3.4", user "app"')
        asked = []
        reconnect = BackoffPolicy(base=RECONNECT_BACKOFF.base, max_attempts=1)
        arguments = {"ssl": False, "password": lambda: asked.append(1) or "token", "reconnect": reconnect}
        async with ResilientPool(proxy.dsn(postgres.dsn()), **arguments) as pool:
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await pool.fetchval("SELECT 42")
        assert len(asked) == 1
