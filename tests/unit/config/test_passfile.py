from __future__ import annotations

import pytest

from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import Secret


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    for name in ("HOST", "PORT", "USER", "PASSWORD", "PASSFILE", "DATABASE", "SERVICE", "SERVICEFILE"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def passfile(tmp_path):
    path = tmp_path / ".pgpass"

    def write(text, mode=0o600):
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    return write


def found(dsn="postgresql://u@h:5433/db", **arguments):
    password = PoolConfig.from_arguments(dsn, **arguments).password
    return None if password is None else password().reveal()


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("h:5433:db:u:secret", "secret"),
        ("*:*:*:*:secret", "secret"),
        ("h:5432:db:u:secret", None),
        ("h2:5433:db:u:secret", None),
        ("h:5433:db2:u:secret", None),
        ("h:5433:db:u2:secret", None),
        ("h:5433:db:u", None),
        ("# h:5433:db:u:secret", None),
        ("h:5433:db:u:se:cr:et", "se:cr:et"),
        (r"h:5433:db:u:se\:cr\\et", r"se:cr\et"),
        ("h:5433:db:u:\\", "\\"),
        ("h:5433:db:u: secret # no comment \r", " secret # no comment "),
        ("x:1:db:u:first\nh:5433:db:u:second\n*:*:*:*:third", "second"),
        ("h:5433:db:u:pässwörd", "pässwörd"),
    ],
)
def test_a_line_of_the_password_file_matches_as_the_manual_says(passfile, line, password):
    """Four fields, each literal or a star, backslash escapes, first match first."""
    passfile(f"# hostname:port:database:username:password\n\n{line}\n")
    assert found() == password


def test_an_escaped_colon_is_part_of_its_field(passfile):
    """IPv6 addresses and database names with colons can be written; an escaped star is a star."""
    passfile("\\:\\:1:5433:d\\:b:u:secret\nh:1:\\*:u:wrong\n")
    assert found("postgresql://u@[::1]:5433/d%3Ab") == "secret"
    assert found("postgresql://u@h:1/db") is None


def test_the_hosts_are_looked_up_in_their_order(passfile):
    """The first host that has a line decides, as in asyncpg."""
    passfile("b:2:*:*:for-b\nc:3:*:*:for-c\n")
    assert found("postgresql://u@a:1,b:2,c:3/db") == "for-b"


def test_a_socket_is_local(passfile):
    """`localhost` stands for every socket directory, and the directory's own name for itself."""
    passfile("localhost:5432:*:*:local\n")
    assert found("postgresql:///db?host=/somewhere&user=u") == "local"
    assert found("postgresql:///db?user=u") == "local"
    passfile("/somewhere:5432:*:*:own\n")
    assert found("postgresql:///db?host=/somewhere&user=u") == "own"


def test_the_database_is_called_like_the_user_unless_it_is_named(passfile):
    """As everywhere in PostgreSQL."""
    passfile("*:*:u:u:secret\n")
    assert found("postgresql://u@h") == "secret"


def test_a_file_that_others_may_read_is_ignored_with_a_warning(passfile):
    """The warning names the file and the permissions it should have."""
    passfile("*:*:*:*:secret\n", mode=0o640)
    with pytest.warns(UserWarning, match=r"\.pgpass' is ignored: its permissions must be u=rw \(0600\) or less"):
        assert found() is None


def test_what_is_no_plain_file_is_ignored_with_a_warning(tmp_path):
    """A directory, for instance."""
    with pytest.warns(UserWarning, match="it is not a plain file"):
        assert found(passfile=tmp_path) is None


def test_the_password_file_may_be_named(passfile, monkeypatch, tmp_path):
    """By an argument, by the DSN, by PGPASSFILE; one that is missing has no password."""
    path = passfile("*:*:*:*:secret\n").rename(tmp_path / "elsewhere")
    assert found() is None
    assert found(passfile=str(path)) == "secret"
    assert found(passfile=path) == "secret"
    assert found(f"postgresql://u@h/db?passfile={path}") == "secret"
    monkeypatch.setenv("PGPASSFILE", str(path))
    assert found() == "secret"


def test_a_password_from_elsewhere_comes_first(passfile, monkeypatch):
    """The DSN's, an argument or PGPASSWORD: the file is not looked at."""
    passfile("*:*:*:*:secret\n")
    assert PoolConfig.from_arguments("postgresql://u:own@h").password == Secret("own")
    monkeypatch.setenv("PGPASSWORD", "environment")
    config = PoolConfig.from_arguments("postgresql://u@h")
    assert config.password == Secret("environment")
    assert "environment" not in repr(config)


def test_a_password_changed_in_the_file_is_used_at_the_next_connect(passfile):
    """The file is read anew when asked; what is known to be secret follows, and an emptied file keeps the last."""
    passfile("*:*:*:*:before\n")
    config = PoolConfig.from_arguments("postgresql://u@h")
    assert config.secrets() == (Secret("before"),)
    passfile("*:*:*:*:after\n")
    assert config.password().reveal() == "after"
    assert config.secrets() == (Secret("after"),)
    passfile("")
    assert config.password().reveal() == "after"
    assert "after" not in repr(config) + repr(config.password)
