"""Which URLs and addresses are refused, in every spelling that leads there."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from app.errors import InputError
from app.job.address import checked_addresses, parse_url, refusal

REFUSED = [
    # loopback
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "::ffff:127.0.0.1", "::127.0.0.1",
    # private
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255",
    "fc00::1", "fd12:3456::1", "::ffff:10.0.0.1", "::ffff:192.168.1.1",
    # link-local and metadata
    "169.254.0.1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fd00:ec2::254", "fd20:ce::254",
    "100.100.100.200", "168.63.129.16", "192.0.0.192",
    # this host, shared, documentation, benchmarks, multicast, reserved, broadcast
    "0.0.0.0", "0.1.2.3", "::", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1",
    "198.51.100.1", "203.0.113.1", "198.18.0.1", "198.19.255.255", "192.88.99.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "ff02::1", "2001:db8::1", "3fff::1", "fec0::1",
    "100::1", "5f00::1", "4000::1",
    # IPv4 inside IPv6
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b::c0a8:1", "64:ff9b:1::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "::ffff:0:127.0.0.1",
]  # fmt: skip
ALLOWED = [
    "1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.15.255.255", "172.32.0.1",
    "169.253.1.1", "192.167.1.1", "198.17.0.1", "223.255.255.255", "2606:4700::1111", "2a00:1450::1",
    "2620:4f:8000::1", "::ffff:8.8.8.8", "64:ff9b::808:808",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_addresses_beyond_the_public_internet_are_refused(text: str) -> None:
    assert refusal(ip_address(text)) is not None


@pytest.mark.parametrize("text", ALLOWED)
def test_public_addresses_are_allowed_also_just_beside_refused_ones(text: str) -> None:
    assert refusal(ip_address(text)) is None


def test_a_trusted_network_opens_private_addresses_but_never_metadata() -> None:
    opened = {text for text in REFUSED if refusal(ip_address(text), allow_private=True) is None}
    assert {"127.0.0.1", "::1", "10.0.0.1", "192.168.0.1", "fc00::1", "::ffff:10.0.0.1"} <= opened
    assert not opened & {"169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254",
                         "fd20:ce::254", "100.100.100.200", "0.0.0.0", "224.0.0.1", "fe80::1"}  # fmt: skip


SPELLINGS = {
    # (what a lenient parser would take for 127.0.0.1, localhost or the metadata service)
    "http://2130706433/": "source_url_invalid",
    "http://0x7f000001/": "source_url_invalid",
    "http://017700000001/": "source_url_invalid",
    "http://0x7f.0.0.1/": "source_url_invalid",
    "http://0177.0.0.1/": "source_url_invalid",
    "http://127.1/": "source_url_invalid",
    "http://127.0.1/": "source_url_invalid",
    "http://127.0.0.01/": "source_url_invalid",
    "http://127.0.0.0x1/": "source_url_invalid",
    "http://256.0.0.1/": "source_url_invalid",
    "http://4294967297/": "source_url_invalid",
    "http://0/": "source_url_invalid",
    "http://0x/": "source_url_invalid",
    "http://127.0.0.1./": "source_address_refused",
    "http://127.0.0.1/": "source_address_refused",
    "http://[::1]/": "source_address_refused",
    "http://[0:0:0:0:0:0:0:1]/": "source_address_refused",
    "http://[::ffff:7f00:1]/": "source_address_refused",
    "http://[::ffff:127.0.0.1]/": "source_address_refused",
    "http://[64:ff9b::169.254.169.254]/": "source_address_refused",
    "http://[fe80::1%25eth0]/": "source_url_invalid",
    "http://[fe80::1%eth0]/": "source_url_invalid",
    "http://[::1/": "source_url_invalid",
    "http://[v1.a]/": "source_url_invalid",
    "http://[127.0.0.1]/": "source_url_invalid",
    "http://１２７.０.０.１/": "source_url_invalid",
    "http://127。0。0。1/": "source_url_invalid",
    "http://①②⑦.⓪.⓪.①/": "source_url_invalid",
    "http://ｌocalhost/": "source_url_invalid",
    "http://bücher.example/": "source_url_invalid",
    "http://%31%32%37.0.0.1/": "source_url_invalid",
    "http://localhost%2f.example/": "source_url_invalid",
    "http://public.example@127.0.0.1/": "source_url_credentials",
    "http://user:secret@public.example/": "source_url_credentials",
    "http://127.0.0.1#@public.example/": "source_address_refused",
    "http://127.0.0.1?@public.example/": "source_address_refused",
    "http://127.0.0.1\\@public.example/": "source_url_invalid",
    "http:\\\\127.0.0.1/": "source_url_invalid",
    "http://127.0.0.1\t/": "source_url_invalid",
    "http://public.example/a b": "source_url_invalid",
    "http://public.example/a\r\nHost: inner": "source_url_invalid",
    "http://public.example\x00.inner/": "source_url_invalid",
    "http://a..b/": "source_url_invalid",
    "http://.public.example/": "source_url_invalid",
    "http://-a.example/": "source_url_invalid",
    f"http://{'a' * 64}.example/": "source_url_invalid",
    f"http://{'a.' * 130}example/": "source_url_invalid",
    f"http://public.example/{'a' * 9000}": "source_url_invalid",
    "http:///path": "source_url_invalid",
    "http://": "source_url_invalid",
    "http://public.example:0x50/": "source_url_invalid",
    "http://public.example:99999/": "source_url_invalid",
    "http://public.example:22/": "source_url_port",
    "http://public.example:0/": "source_url_port",
    "https://public.example:6379/": "source_url_port",
    "file:///etc/passwd": "source_url_scheme",
    "ftp://public.example/": "source_url_scheme",
    "gopher://public.example/": "source_url_scheme",
    "data:video/mp4;base64,AAAA": "source_url_scheme",
    "//public.example/a": "source_url_scheme",
    "public.example/a": "source_url_scheme",
    "http+unix://x/": "source_url_scheme",
    "": "source_url_scheme",
    "http://mixed.example/": "source_address_refused",
    "http://inner.example/": "source_address_refused",
    "http://LOCALHOST./": "source_address_refused",
    "http://zone.example/": "source_address_refused",
}
NAMES = {
    "public.example": ["93.184.216.34", "2606:4700::1111"],
    "mixed.example": ["93.184.216.34", "10.0.0.7"],
    "inner.example": ["169.254.169.254"],
    "localhost": ["127.0.0.1", "::1"],
    "zone.example": ["fe80::1%eth0"],
}


def resolve(host: str, port: int) -> list[str]:
    return NAMES[host]


@pytest.mark.parametrize(("url", "code"), SPELLINGS.items())
def test_no_spelling_leads_inside(url: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_addresses(parse_url(url), resolve, allow_private=False)
    assert caught.value.code == code
    for secret in ("secret", "10.0.0.7", "169.254.169.254"):
        if "169.254" not in url:  # what the caller wrote may be repeated
            assert secret not in caught.value.message


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://public.example", ("public.example", 443, "public.example", "/")),
        (" HTTPS://Public.Example./a?b=c#d ", ("public.example", 443, "public.example", "/a?b=c")),
        ("http://public.example:80/", ("public.example", 80, "public.example", "/")),
        ("http://public.example:8080/ä?ö", ("public.example", 8080, "public.example:8080", "/%C3%A4?%C3%B6")),
        ("http://public.example/a%20b%2Fc", ("public.example", 80, "public.example", "/a%20b%2Fc")),
        ("https://[2606:4700::1111]:8443/a", ("2606:4700::1111", 8443, "[2606:4700::1111]:8443", "/a")),
        ("http://8.8.8.8?x", ("8.8.8.8", 80, "8.8.8.8", "/?x")),
        ("http://my_files.3com.example/", ("my_files.3com.example", 80, "my_files.3com.example", "/")),
    ],
)
def test_what_a_url_asks_for(url: str, asked: tuple[str, int, str, str]) -> None:
    target = parse_url(url)
    assert (target.host, target.port, target.authority, target.path) == asked


def test_the_resolver_is_asked_once_and_not_for_a_number() -> None:
    asked: list[str] = []

    def count(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34", "93.184.216.34", "2606:4700::1111"]

    addresses = checked_addresses(parse_url("http://public.example"), count, allow_private=False)
    assert [str(a) for a in addresses] == ["93.184.216.34", "2606:4700::1111"]
    checked_addresses(parse_url("http://8.8.8.8"), count, allow_private=False)
    assert asked == ["public.example"]
