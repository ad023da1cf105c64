"""Which requests could come from a web page of another site, and are refused."""

from __future__ import annotations

import pytest

from shared.cross_site import (
    CrossSitePolicy,
    Sender,
    checked_hosts,
    checked_origins,
    refused_media_type,
    refused_sender,
)
from shared.errors import ServiceError

POLICY = CrossSitePolicy(
    origins_key="[gateway] allowed_origins",
    hosts_key="[gateway] allowed_hosts",
    origins=frozenset({"https://chat.example", "app://tool"}),
    hosts=frozenset({"ai.example.com", "*.lab.example.org"}),
)
TOKEN = CrossSitePolicy(origins_key="o", hosts_key="h", hosts=None)
EVERYTHING = CrossSitePolicy(origins_key="o", hosts_key="h", origins=frozenset("*"), hosts=frozenset("*"))


def refused(
    policy: CrossSitePolicy = POLICY,
    *,
    host: str | None = "127.0.0.1:31313",
    origin: str | None = None,
    fetch_site: str | None = None,
) -> ServiceError | None:
    return refused_sender(Sender(host, origin, fetch_site), policy)


@pytest.mark.parametrize(
    "host",
    [
        None,  # HTTP/1.0
        "",
        "127.0.0.1",
        "127.0.0.1:31313",
        "192.168.1.7:31313",
        "[::1]:31313",
        "[::1]",
        "[fe80::1%25eth0]:80",
        "[::ffff:10.0.0.1]:80",
        "localhost",
        "LocalHost:31313",
        "localhost.:31313",
        "api.localhost",
        "neuron:13131",  # a service of docker compose
        "cortex_upstream",  # an nginx upstream block
        "beast.local:13131",
        "beast.internal:13131",
        "beast.home.arpa",
        "neuron.default.svc.cluster.local:13131",
        "ai.example.com",
        "AI.example.com:443",
        "ai.example.com.",
        "gpu1.lab.example.org",
        "a.gpu1.lab.example.org:80",
    ],
)
def test_addresses_private_names_and_configured_names_are_hosts(host: str | None) -> None:
    """What a client on this machine or network calls a service without any configuration."""
    assert refused(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:31313",
        "localhost.evil.example",
        "127.0.0.1.evil.example:31313",
        "127.0.0.1.nip.io",
        "evil.example.",
        "beast.internal.evil.example",
        "internal.example",
        "xlocalhost.example",
        "lab.example.org",  # the pattern is for names below it
        "evil-lab.example.org",
        "x.ai.example.com",
    ],
)
def test_public_names_are_refused_as_host(host: str) -> None:
    """DNS rebinding: the page's own name resolves to this machine, so its request looks same-origin."""
    error = refused(host=host, origin=f"http://{host}", fetch_site="same-origin")
    assert error is not None
    assert (error.status, error.code) == (403, "forbidden")
    assert "[gateway] allowed_hosts" in error.message
    assert host in error.message


def test_host_is_not_checked_where_a_token_is_required() -> None:
    """A page cannot know the token; its Origin is still refused."""
    assert refused(TOKEN, host="evil.example") is None
    assert refused(TOKEN, host="evil.example", origin="http://other.example") is not None


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:31313", "127.0.0.1:31313"),
        ("http://localhost:31313", "LOCALHOST:31313"),
        ("http://[::1]:31313", "[::1]:31313"),
        ("https://ai.example.com", "ai.example.com"),  # a proxy ended TLS
        ("https://ai.example.com", "ai.example.com:443"),
        ("http://ai.example.com:80", "ai.example.com"),
        ("https://chat.example", "127.0.0.1:31313"),
        ("HTTPS://Chat.Example", "127.0.0.1:31313"),
        ("app://tool", "127.0.0.1:31313"),
    ],
)
def test_own_and_allowed_origins_are_accepted(origin: str, host: str) -> None:
    assert refused(origin=origin, host=host, fetch_site="same-origin") is None


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "127.0.0.1:31313"),
        ("null", "127.0.0.1:31313"),  # a sandboxed frame, a file
        ("", "127.0.0.1:31313"),
        ("http://127.0.0.1:8080", "127.0.0.1:31313"),  # another program on this machine
        ("http://127.0.0.1", "127.0.0.1:31313"),
        ("http://localhost:31313", "127.0.0.1:31313"),
        ("https://ai.example.com:8443", "ai.example.com"),
        ("http://ai.example.com", "ai.example.com:443"),
        ("https://chat.example.evil.example", "127.0.0.1:31313"),
        ("https://chat.example, https://chat.example", "127.0.0.1:31313"),
        ("chrome-extension://abcdef", "127.0.0.1:31313"),
        ("127.0.0.1:31313", "127.0.0.1:31313"),
        ("http://127.0.0.1:31313", None),
    ],
)
def test_foreign_origins_are_refused(origin: str, host: str | None) -> None:
    error = refused(origin=origin, host=host)
    assert error is not None
    assert (error.status, error.code) == (403, "forbidden")
    assert "[gateway] allowed_origins" in error.message


def test_cross_site_requests_are_refused_unless_their_origin_is_allowed() -> None:
    """Browsers send no Origin with a plain GET, but say where it came from."""
    for site in ("cross-site", "Cross-Site"):
        error = refused(fetch_site=site)
        assert error is not None
        assert (error.status, error.code) == (403, "forbidden")
        assert refused(fetch_site=site, origin="https://chat.example") is None
    for site in ("none", "same-origin", "same-site"):
        assert refused(fetch_site=site) is None


def test_an_asterisk_allows_all() -> None:
    assert refused(EVERYTHING, host="evil.example", origin="null", fetch_site="cross-site") is None


def test_long_values_are_not_echoed_whole() -> None:
    for error in (
        refused(host="a." * 5000),
        refused(origin="http://" + "a" * 9000),
        refused_media_type("POST", "a" * 9000),
    ):
        assert error is not None
        assert len(error.message) < 400


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/html",
        "application/jsonx",
        "json",
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_bodies_that_are_not_json_are_refused(method: str, kind: str) -> None:
    """A page can send the first four without a preflight."""
    error = refused_media_type(method, kind)
    assert error is not None
    assert (error.status, error.code) == (415, "invalid_request")
    assert "application/json" in error.message
    assert refused_media_type("GET", kind) is None


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/vnd.api+json",
        "application/octet-stream",  # what libraries send with bytes
        "",
        None,  # a script, or `curl -X POST .../drain`
    ],
)
def test_json_is_accepted(kind: str | None) -> None:
    assert refused_media_type("POST", kind) is None


def test_configured_origins_and_hosts_are_checked() -> None:
    """A mistake in a configuration must not look like a rule that never matches."""
    assert checked_origins(["https://Chat.Example/", "app://tool", "null", "*"]) == [
        "https://chat.example",
        "app://tool",
        "null",
        "*",
    ]
    assert checked_hosts(["AI.example.com.", "*.example.com", "*"]) == ["ai.example.com", "*.example.com", "*"]
    for origin in ("chat.example", "https://", "https://chat.example/path", "https://a b", ""):
        with pytest.raises(ValueError, match="not an origin"):
            checked_origins([origin])
    for host in ("http://ai.example.com", "ai.example.com:443", "*example.com", "a..b", ""):
        with pytest.raises(ValueError, match="not a name"):
            checked_hosts([host])
