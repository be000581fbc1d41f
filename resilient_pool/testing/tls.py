"""Certificates for tests, made on the spot: nothing here is ever to be trusted outside a test."""

from __future__ import annotations

import ssl
from pathlib import Path


class TlsCertificates:
    """A certificate authority of its own, and a server certificate that it signed. Needs the extra `testing`.

    Args:
        names: Host names and addresses that the server certificate is good for.
    """

    def __init__(self, *names: str) -> None:
        import trustme  # noqa: PLC0415 - part of the extra `testing`

        self._authority = trustme.CA()
        self._server = self._authority.issue_cert(*(names or ("127.0.0.1", "localhost")))

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate, as a client needs it."""
        return self._authority.cert_pem.bytes()

    def write_ca(self, path: str | Path) -> Path:
        """Write the authority's certificate to a file, for `sslrootcert=`, and return where it is."""
        target = Path(path)
        target.write_bytes(self.ca_pem)
        return target

    def server_context(self) -> ssl.SSLContext:
        """Make the context of a server that has the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.configure_cert(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Make the context of a client that trusts this authority alone and checks the host's name."""
        context = ssl.create_default_context()
        context.load_verify_locations(cadata=self.ca_pem.decode())
        return context
