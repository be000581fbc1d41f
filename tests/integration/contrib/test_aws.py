"""Passwords from AWS: tokens as botocore signs them, and a secret that is rotated under a pool on a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import asyncpg
import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.session
import pytest

from resilient_pool import ConfigurationError, ResilientPool
from resilient_pool.config.secrets import Secret
from resilient_pool.contrib.aws import AwsKeys, DsqlToken, RdsToken, SecretsManager, default_keys

ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "AKIDEXAMPLE", "wJalr/XUt+nFEMI=K7MDENG", "lent/for+a=while"
RDS = "shop.abc123.eu-central-1.rds.amazonaws.com"
DSQL = "abc123.dsql.us-east-2.on.aws"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    """No keys of the machine's are found, and no request is sent to look for some."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def keys(token=None, expires_at=None):
    return AwsKeys(
        access_key=ACCESS_KEY,
        secret_key=Secret(SECRET_KEY),
        session_token=None if token is None else Secret(token),
        expires_at=expires_at,
    )


def signed_by_botocore(token, service, region, host, parameters):
    """Return a token as botocore signs it now, and when that was."""
    credentials = botocore.credentials.Credentials(ACCESS_KEY, SECRET_KEY, token)
    request = botocore.awsrequest.AWSRequest("GET", f"https://{host}/", params=parameters)
    botocore.auth.SigV4QueryAuth(credentials, service, region, expires=900).add_auth(request)
    query = dict(parse_qsl(request.prepare().url.partition("?")[2]))
    return query, datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


@pytest.mark.parametrize("token", [None, SESSION_TOKEN])
@pytest.mark.parametrize("user", ["shop", "a user+with/odd=signs@ä"])
async def test_a_token_for_rds_is_signed_as_botocore_signs_it(token, user):
    """For the endpoint with its port, and the user; also with the keys of a role."""
    expected, at = signed_by_botocore(
        token, "rds-db", "eu-central-1", f"{RDS}:5433", {"Action": "connect", "DBUser": user}
    )
    password = (await RdsToken(RDS, user=user, port=5433, keys=lambda: keys(token), now=lambda: at)()).reveal()
    assert password.startswith(f"{RDS}:5433/?")
    assert dict(parse_qsl(password.partition("?")[2])) == expected


@pytest.mark.parametrize(("admin", "action"), [(False, "DbConnect"), (True, "DbConnectAdmin")])
async def test_a_token_for_dsql_is_signed_as_botocore_signs_it(admin, action):
    """For the cluster's endpoint."""
    expected, at = signed_by_botocore(SESSION_TOKEN, "dsql", "us-east-2", DSQL, {"Action": action})
    password = (await DsqlToken(DSQL, admin=admin, keys=lambda: keys(SESSION_TOKEN), now=lambda: at)()).reveal()
    assert password.startswith(f"{DSQL}/?")
    assert dict(parse_qsl(password.partition("?")[2])) == expected


class Time:
    def __init__(self):
        self.now = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)

    def __call__(self):
        return self.now


async def test_a_token_is_signed_once_for_all_and_kept_until_two_minutes_before_its_end():
    """Or before the end of the keys that signed it; and anew after the server has refused it."""
    time, signed = Time(), []

    def source():
        signed.append(time.now)
        return keys(SESSION_TOKEN, expires_at=time.now + timedelta(minutes=lives))

    token, lives = RdsToken(RDS, user="shop", keys=source, now=time), 60
    first = await asyncio.gather(*(token() for _ in range(20)))
    assert len(signed) == 1
    assert set(first) == {first[0]}
    time.now += timedelta(minutes=12, seconds=59)
    assert await token() == first[0]
    time.now += timedelta(seconds=1)
    lives = 5
    assert await token() != first[0]
    time.now += timedelta(minutes=3)
    await token()
    assert len(signed) == 3
    token.refused(None)
    await token()
    assert len(signed) == 4


async def test_those_who_wait_for_a_token_do_not_cancel_each_other():
    """And a failure is one for all of them, but not for the next."""
    released, trouble = threading.Event(), [OSError("away")]

    def source():
        released.wait(10)
        if trouble:
            raise trouble.pop()
        return keys()

    token = RdsToken(RDS, user="shop", keys=source)
    waiting = [asyncio.ensure_future(token()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    released.set()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in ended] == [asyncio.CancelledError, OSError, OSError]
    assert await token()


def test_keys_are_found_where_aws_own_tools_find_them(monkeypatch, tmp_path):
    """In the environment without botocore, in a profile with it; without any the error says what to do."""
    with pytest.raises(ConfigurationError, match="no AWS credentials were found: set AWS_ACCESS_KEY_ID"):
        default_keys()
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    assert default_keys() == keys()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION_TOKEN)
    found = default_keys()
    assert (found.access_key, found.session_token) == ("OTHER", Secret(SESSION_TOKEN))
    assert SECRET_KEY not in repr(found)
    assert SESSION_TOKEN not in repr(found)


def test_the_region_is_in_the_endpoints_name_or_must_be_said(monkeypatch):
    """An alias has none."""
    assert repr(RdsToken(RDS, user="shop")) == f"<RdsToken for {RDS} in eu-central-1>"
    assert repr(DsqlToken(DSQL)) == f"<DsqlToken for {DSQL} in us-east-2>"
    china = "shop.cb1abcdefghi.rds.cn-north-1.amazonaws.com.cn"
    assert repr(RdsToken(china, user="shop")) == f"<RdsToken for {china} in cn-north-1>"
    for unknown in ("db.shop.example", "shop.cb1abcdefghi.rds.amazonaws.com"):
        with pytest.raises(ConfigurationError, match="region is not known: pass region="):
            RdsToken(unknown, user="shop")
    assert "eu-north-1" in repr(RdsToken("db.shop.example", user="shop", region="eu-north-1"))
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert "eu-west-3" in repr(RdsToken(RDS, user="shop"))


class Vault:
    """Secrets Manager as far as botocore's client asks it, on a loopback address."""

    def __init__(self):
        self.versions = {}
        self.asked = []
        vault = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["X-Amz-Target"] == "secretsmanager.GetSecretValue"
                vault.asked.append(request["VersionStage"])
                text = vault.versions.get(request["VersionStage"])
                answer = {"__type": "ResourceNotFoundException"} if text is None else {"SecretString": text}
                body = json.dumps(answer).encode()
                self.send_response(400 if text is None else 200)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def has(self, password, stage="AWSCURRENT"):
        self.versions[stage] = json.dumps({"username": "rotated", "password": password, "engine": "postgres"})


@pytest.fixture
def vault():
    made = Vault()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def secret(vault, monkeypatch):
    """The secret as an application has it: the client is botocore's own, found by the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", f"http://127.0.0.1:{vault.server.server_port}")
    return SecretsManager("prod/shop")


@pytest.fixture
async def role(dsn):
    """A role whose password a rotation changes."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE ROLE rotated LOGIN PASSWORD 'first-of-them'")
    yield connection
    await connection.execute("DROP ROLE rotated")
    await connection.close()


async def test_a_rotation_is_not_noticed_by_the_applications_callers(postgres, role, vault, secret):
    """Each of its steps: the password is changed before the secret's version is the present one, and after."""
    vault.has("first-of-them")
    async with ResilientPool(
        host=postgres.host, port=postgres.port, database="postgres", credentials=secret, ssl=False
    ) as pool:

        async def works():
            await pool.expire_connections()
            return (
                await asyncio.gather(*(pool.fetchval("SELECT session_user::text") for _ in range(5))) == ["rotated"] * 5
            )

        assert await works()
        assert await works()
        assert vault.asked == ["AWSCURRENT"]
        vault.has("second-of-them", "AWSPENDING")
        assert await works()
        assert vault.asked == ["AWSCURRENT"]
        await role.execute("ALTER ROLE rotated PASSWORD 'second-of-them'")  # the rotation's step setSecret
        assert await works()
        assert vault.asked == ["AWSCURRENT", "AWSCURRENT", "AWSPENDING"]
        assert await works()
        assert len(vault.asked) == 3
        del vault.versions["AWSPENDING"]  # its step finishSecret
        vault.has("second-of-them")
        await role.execute("ALTER ROLE rotated PASSWORD 'third-of-them'")
        vault.has("third-of-them")
        assert await works()
        assert vault.asked[3:] == ["AWSCURRENT"]


async def test_a_password_that_nothing_cures_is_refused(postgres, role, vault, secret):
    """The server's own error; the secret is in no message, note or log line."""
    vault.has("wrong-altogether")
    pool = ResilientPool(host=postgres.host, port=postgres.port, database="postgres", credentials=secret, ssl=False)
    async with pool:
        with pytest.raises(asyncpg.InvalidPasswordError) as caught:
            await pool.fetchval("SELECT 1")
    assert vault.asked == ["AWSCURRENT", "AWSCURRENT", "AWSPENDING"]
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "wrong-altogether" not in shown + repr(pool) + repr(secret)


@pytest.mark.parametrize(
    "text", ["no-json-but-a-secret", '{"username": "u"}', "[1]", '{"username": "u", "password": 5}']
)
async def test_a_secret_of_another_form_is_refused_without_showing_it(vault, secret, text, caplog):
    """The error names the secret and the form."""
    caplog.set_level(logging.INFO)
    vault.versions["AWSCURRENT"] = text
    with pytest.raises(ConfigurationError, match="the value of the secret prod/shop must be JSON") as caught:
        await secret()
    assert caught.value.__context__ is None
    frames = traceback.TracebackException(
        ConfigurationError, caught.value, caught.value.__traceback__.tb_next, capture_locals=True
    )
    assert "no-json-but-a-secret" not in "".join(frames.format()) + caplog.text
