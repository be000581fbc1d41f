"""Passwords from AWS: tokens of IAM for RDS, Aurora and Aurora DSQL, and secrets of Secrets Manager while they are rotated.

    pool = ResilientPool(host=HOST, user="shop", database="shop", ssl="verify-full", password=RdsToken(HOST, user="shop"))
    pool = ResilientPool(host=HOST, user="admin", database="postgres", ssl="verify-full", password=DsqlToken(HOST))
    pool = ResilientPool(host=HOST, database="shop", credentials=SecretsManager("prod/shop"))

Tokens are signed here: that needs no request, and botocore only to find the keys where the environment does not hold them (a role of an
instance, a task or a pod, a profile). `SecretsManager` asks AWS through botocore. Both come with the extra `aws`.

No token, key or secret is in a `repr`, a message or a local variable of a frame that can raise.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from resilient_pool.config.secrets import Hidden, Secret
from resilient_pool.errors import ConfigurationError

T = TypeVar("T")

_TOKEN_LIFE = timedelta(minutes=15)
# So long before its end a token is replaced: it must still be good when the server looks at it.
_MARGIN = timedelta(minutes=2)
_WHILE_ROTATING = timedelta(minutes=1)
_EMPTY_BODY = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"
_REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-[0-9]+")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsKeys:
    """What signs a request.

    Attributes:
        access_key: The id of the key. It is no secret, but part of every signature.
        secret_key: The key.
        session_token: What belongs to keys that are lent for a while, by a role for one.
        expires_at: Until when they are good; `None` if that is not known.
    """

    access_key: str
    secret_key: Secret
    session_token: Secret | None = None
    expires_at: datetime | None = None


KeySource = Callable[[], "AwsKeys"]
"""Returns the keys to sign with. It is called in a thread: it may block."""


def default_keys() -> AwsKeys:
    """Find the keys as AWS's own tools do: in the environment, else through botocore (profile, role of the task, pod or instance).

    Raises:
        ConfigurationError: There are none, or the environment has none and botocore is not installed.
    """
    access_key, secret_key = os.environ.get("AWS_ACCESS_KEY_ID"), Hidden(os.environ.get("AWS_SECRET_ACCESS_KEY"))
    if access_key and secret_key.reveal():
        token = os.environ.get("AWS_SESSION_TOKEN")
        return AwsKeys(
            access_key=access_key,
            secret_key=Secret(secret_key.reveal() or ""),
            session_token=None if not token else Secret(token),
        )
    found = _botocore_session("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set").get_credentials()
    if found is None:
        raise ConfigurationError(
            "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        )
    frozen = found.get_frozen_credentials()
    return AwsKeys(
        access_key=frozen.access_key,
        secret_key=Secret(frozen.secret_key),
        session_token=None if not frozen.token else Secret(frozen.token),
        expires_at=getattr(found, "_expiry_time", None),
    )


def _botocore_session(otherwise: str) -> Any:
    try:
        import botocore.session  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            f"{otherwise}, and botocore is not installed: pip install 'resilient-pool[aws]'"
        ) from error
    return botocore.session.get_session()


def _region(given: str | None, host: str) -> str:
    region = given or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _region_in(host)
    if not region:
        raise ConfigurationError("region is not known: pass region=, or set AWS_REGION")
    return region


def _region_in(host: str) -> str | None:
    """Read the region from an endpoint's name: `name.id.eu-central-1.rds.amazonaws.com`, `id.dsql.eu-central-1.on.aws`."""
    name = host.lower()
    parts = name.split(".")
    # In China's names the region of RDS stands behind the service.
    for service, suffix, step in (
        ("rds", ".amazonaws.com", -1),
        ("rds", ".amazonaws.com.cn", 1),
        ("dsql", ".on.aws", 1),
    ):
        if service in parts[1:-1] and name.endswith(suffix):
            found = parts[parts.index(service) + step]
            return found if _REGION.fullmatch(found) else None
    return None


def presign(
    keys: AwsKeys, *, service: str, region: str, host: str, parameters: dict[str, str], at: datetime, seconds: int
) -> Secret:
    """Sign a GET request of that host in its query (Signature Version 4), and return it without `https://`: that is a token."""
    stamp = at.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    query = Hidden(
        parameters
        | {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{keys.access_key}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": "host",
        }
        | ({} if keys.session_token is None else {"X-Amz-Security-Token": keys.session_token.reveal()})
    )
    encoded = Secret(
        "&".join(
            f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query.reveal().items())
        )
    )
    request = Secret(f"GET\n/\n{encoded.reveal()}\nhost:{host}\n\nhost\n{_EMPTY_BODY}")
    to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request.reveal().encode()).hexdigest()}"
    key = Hidden(f"AWS4{keys.secret_key.reveal()}".encode())
    for part in (stamp[:8], region, service, "aws4_request"):
        key = Hidden(hmac.digest(key.reveal(), part.encode(), "sha256"))
    signature = Hidden(hmac.digest(key.reveal(), to_sign.encode(), "sha256").hex())
    return Secret(f"{host}/?{encoded.reveal()}&X-Amz-Signature={signature.reveal()}")


class _Shared(Generic[T]):
    """Something that is made when it is asked for, kept while it is good, and made once for all who ask at the same time."""

    def __init__(
        self, make: Callable[[], Coroutine[Any, Any, tuple[T, datetime]]], now: Callable[[], datetime]
    ) -> None:
        self._make = make
        self._now = now
        self._kept: tuple[T, datetime] | None = None
        self._making: asyncio.Task[tuple[T, datetime]] | None = None

    async def get(self) -> T:
        """Return what is kept, or make it."""
        if self._kept is not None and self._now() < self._kept[1]:
            return self._kept[0]
        loop = asyncio.get_running_loop()
        if self._making is None or self._making.done() or self._making.get_loop() is not loop:
            self._making = loop.create_task(self._make())
            self._making.add_done_callback(self._made)
        making = self._making
        # Not cancelled with one of those who wait: another one needs it.
        await asyncio.wait([making])
        return making.result()[0]

    def _made(self, making: asyncio.Task[tuple[T, datetime]]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._kept = making.result()

    def forget(self) -> None:
        """Make it anew next time."""
        self._kept = None


class _Token:
    """A token of IAM as `password=`: signed when a connection needs one, kept until 2 minutes before its end after 15."""

    def __init__(
        self,
        service: str,
        host: str,
        *,
        port: int | None = None,
        parameters: dict[str, str],
        region: str | None,
        keys: KeySource,
        now: Callable[[], datetime],
    ) -> None:
        self._service = service
        self._host = host
        self._signed_host = host if port is None else f"{host}:{port}"
        self._parameters = parameters
        self._region = _region(region, host)
        self._keys = keys
        self._now = now
        self._shared: _Shared[Secret] = _Shared(self._sign, now)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {self._host} in {self._region}>"

    async def __call__(self) -> Secret:
        """Return a token that is good for 2 minutes or more."""
        return await self._shared.get()

    def refused(self, _password: Secret | None) -> None:
        """Sign anew the next time: the keys may have changed. The pool calls this."""
        self._shared.forget()

    async def _sign(self) -> tuple[Secret, datetime]:
        # In a thread: a role's keys are asked for over the network.
        keys = await asyncio.to_thread(self._keys)
        at = self._now()
        token = presign(
            keys,
            service=self._service,
            region=self._region,
            host=self._signed_host,
            parameters=self._parameters,
            at=at,
            seconds=int(_TOKEN_LIFE.total_seconds()),
        )
        ends = at + _TOKEN_LIFE
        if keys.expires_at is not None:
            ends = min(ends, keys.expires_at)  # a token is worth nothing without the keys that signed it
        return token, ends - _MARGIN


class RdsToken(_Token):
    """The password of a database user of RDS or Aurora that logs in by IAM.

    Args:
        host: The endpoint, as AWS names it: the token is for this name, also when the pool connects to an alias or a tunnel.
        user: The database's user, to whom `rds_iam` was granted.
        port: The endpoint's port; 5432 by default.
        region: The region; by default that of the environment, or in the endpoint's name.
        keys: Returns what to sign with; by default as `default_keys()` finds it.
        now: The time, for tests.

    Raises:
        ConfigurationError: The region is not known.
    """

    def __init__(
        self,
        host: str,
        *,
        user: str,
        port: int = 5432,
        region: str | None = None,
        keys: KeySource = default_keys,
        now: Callable[[], datetime] = _now,
    ) -> None:
        parameters = {"Action": "connect", "DBUser": user}
        super().__init__("rds-db", host, port=port, parameters=parameters, region=region, keys=keys, now=now)


class DsqlToken(_Token):
    """The password of a user of Aurora DSQL.

    Args:
        host: The cluster's endpoint.
        admin: Whether for the user `admin`; by default for others, to whom a role of IAM was granted.
        region: The region; by default that of the environment, or in the endpoint's name.
        keys: Returns what to sign with; by default as `default_keys()` finds it.
        now: The time, for tests.

    Raises:
        ConfigurationError: The region is not known.
    """

    def __init__(
        self,
        host: str,
        *,
        admin: bool = False,
        region: str | None = None,
        keys: KeySource = default_keys,
        now: Callable[[], datetime] = _now,
    ) -> None:
        parameters = {"Action": "DbConnectAdmin" if admin else "DbConnect"}
        super().__init__("dsql", host, parameters=parameters, region=region, keys=keys, now=now)


class SecretsManager:
    """User and password of a secret in Secrets Manager, as `credentials=`, also while it is rotated.

    The secret's present version (AWSCURRENT) is asked for once for all connections, and kept for `keep` seconds. When the server has
    refused it, it is asked for anew; if that is what was refused, the version that a rotation has made and not yet declared the present
    one (AWSPENDING) is used, if there is one.

    Args:
        secret_id: The secret's name or ARN. Its value is JSON with `username` and `password`, as AWS's own rotation has it.
        keep: For how many seconds a version is used without asking again; an hour by default.
        client: A client of botocore or boto3 for `secretsmanager`; by default one is made when it is first needed.
        region: The region of that one; by default that of the environment.
        now: The time, for tests.
    """

    def __init__(
        self,
        secret_id: str,
        *,
        keep: float = 3600.0,
        client: Any = None,
        region: str | None = None,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self._secret_id = secret_id
        self._keep = timedelta(seconds=keep)
        self._client = client
        self._region = region
        self._now = now
        self._refused: Secret | None = None
        self._shared: _Shared[tuple[str, Secret]] = _Shared(self._fetch, now)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._secret_id}>"

    async def __call__(self) -> tuple[str, Secret]:
        """Return user and password.

        Raises:
            ConfigurationError: The secret's value has another form, or botocore is not installed.
            Exception: What botocore raises.
        """
        return await self._shared.get()

    def refused(self, password: Secret | None) -> None:
        """Ask again the next time, and do not give that password again if there is another. The pool calls this."""
        self._refused = password
        self._shared.forget()

    async def _fetch(self) -> tuple[tuple[str, Secret], datetime]:
        login = await asyncio.to_thread(self._read, "AWSCURRENT")
        keep = self._keep
        if login.reveal()[1] == self._refused:
            pending = await asyncio.to_thread(self._read_pending)
            # Soon it is the present version, or the rotation has failed.
            login, keep = (login, keep) if pending is None else (pending, min(keep, _WHILE_ROTATING))
        return login.reveal(), self._now() + keep

    def _read_pending(self) -> Hidden[tuple[str, Secret]] | None:
        try:
            return self._read("AWSPENDING")
        except Exception as error:
            answer = getattr(error, "response", {})
            if answer.get("Error", {}).get("Code") == "ResourceNotFoundException":
                return None
            raise

    def _read(self, stage: str) -> Hidden[tuple[str, Secret]]:
        if self._client is None:
            session = _botocore_session("a secret is to be read")
            self._client = session.create_client("secretsmanager", region_name=self._region)
        text = Hidden(self._client.get_secret_value(SecretId=self._secret_id, VersionStage=stage).get("SecretString"))
        login = _login_in(text)
        if login is None:
            raise ConfigurationError(
                f"the value of the secret {self._secret_id} must be JSON with the texts username and password"
            )
        return login


def _login_in(text: Hidden[Any]) -> Hidden[tuple[str, Secret]] | None:
    try:
        fields = Hidden(json.loads(text.reveal()))
        return Hidden((str(fields.reveal()["username"]), Secret(fields.reveal()["password"])))
    except (ValueError, TypeError, KeyError):
        return None  # the error holds the text
