"""Tables in a real kernel: nft lists them as we print them, they do what they say, and every difference is found."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from ipaddress import ip_address, ip_network

import pytest

from mesh.linux import nft
from mesh.linux.nft import Chain, ChainType, Hook, HookPoint, Rule, Table
from mesh.linux.nft_apply import NftRefused, delete_tables, find_differences, list_tables, read_tables, replace_tables
from mesh.model.address import SocketAddress
from mesh.testing.netns import EchoServer, echoes, namespaces, wire

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

V4 = [SocketAddress.parse(text) for text in ("10.0.0.1:80", "10.0.0.2:81", "10.0.0.3:82")]
V6 = [SocketAddress.parse(text) for text in ("[fd00::1]:80", "[fd00::2]:81")]
EVERYTHING = Table(
    "everything",
    (
        Chain("aside"),
        Chain(
            "prerouting",
            (
                Rule((nft.saddr(ip_address("169.254.7.127")), nft.l4proto(6), nft.counter(), nft.accept()), "a comment, at the end"),
                Rule((nft.daddr(ip_address("::1"), negate=True), nft.tcp_dport(15008, negate=True), nft.counter(), nft.redirect(15006))),
                Rule((nft.daddr(ip_network("10.9.0.0/16")), nft.tcp_dport(80), nft.dnat_to_random(V4))),
                Rule((nft.daddr(ip_network("10.9.0.0/19")), nft.udp_dport(80), nft.dnat(V4[0]))),
                Rule((nft.daddr(ip_network("fd00::/64")), nft.tcp_dport(80), nft.dnat_to_random(V6))),
                Rule((nft.daddr(ip_network("fd00::/64")), nft.udp_dport(53), nft.dnat(V6[0]))),
            ),
            Hook(ChainType.NAT, HookPoint.PREROUTING, -100),
        ),
        Chain(
            "filter",
            (
                Rule((nft.l4proto(6), nft.reject_with_tcp_reset())),
                Rule((nft.l4proto(17), nft.oifname("lo"), nft.jump("aside"))),
                Rule((nft.iifname("eth0", negate=True), nft.goto("aside"))),
                Rule((nft.ct_state("established", "related"), nft.accept())),
                Rule((nft.ct_state("new"), nft.counter())),
                Rule((nft.tcp_flags(("syn",), ("fin", "syn", "rst", "ack")), nft.mark(0x539, 0xFFF, negate=True), nft.drop())),
                Rule((nft.ct_mark(0x111, 0xFFF), nft.set_mark_from_ct())),
                Rule((nft.mark(0x539, 0xFFF), nft.set_ct_mark(0x111, 0xFFF))),
                Rule((nft.return_(),)),
            ),
            Hook(ChainType.FILTER, HookPoint.FORWARD, 0),
        ),
        Chain(
            "postrouting",
            (
                Rule((nft.oifname("lo", negate=True), nft.saddr(ip_network("10.0.0.0/8")), nft.masquerade())),
                Rule((nft.saddr(ip_address("10.1.1.1")), nft.snat(ip_address("10.1.1.2")))),
                Rule((nft.saddr(ip_address("fd01::1")), nft.snat(ip_address("fd01::2")))),
            ),
            Hook(ChainType.NAT, HookPoint.POSTROUTING, 100),
        ),
        Chain("output", (), Hook(ChainType.ROUTE, HookPoint.OUTPUT, -150)),
        Chain("raw", (Rule((nft.set_ct_original_zone(2),)), Rule((nft.set_ct_zone(1),))), Hook(ChainType.FILTER, HookPoint.OUTPUT, -300)),
    ),
)


def test_nft_lists_every_statement_as_we_print_it() -> None:
    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([EVERYTHING]))
        assert netns.output("nft", "--stateless", "list", "ruleset") == nft.render([EVERYTHING])
        assert netns.run(lambda: find_differences([EVERYTHING])) == []


def test_a_missing_table_is_a_difference() -> None:
    with namespaces("nft") as (netns,):
        assert netns.run(lambda: find_differences([EVERYTHING])) == ["table everything is missing"]


def test_rules_are_read_back_with_their_texts_and_counters() -> None:
    with namespaces("a", "b") as (near, far), EchoServer(far.listen(80)):
        wire(near, far, ("10.77.0.2/24", "fd77::2/64"), ("10.77.0.1/24", "fd77::1/64"))
        counted = Rule((nft.tcp_dport(80), nft.tcp_flags(("syn",), ("fin", "syn", "rst", "ack")), nft.counter()), "opened")
        stranger = Rule((nft.tcp_dport(81), nft.drop()))
        table = Table("t", (Chain("c", (counted,), Hook(ChainType.FILTER, HookPoint.OUTPUT, 0)),))
        near.run(lambda: replace_tables([Table("t", (Chain("c", (counted, stranger), table.chains[0].hook),))]))
        with near.connect(SocketAddress.parse("10.77.0.1:80")) as sock:
            assert echoes(sock)
        (found,) = near.run(lambda: read_tables([table, Table("missing", ())]))
        (ours, theirs) = found.chains[0].rules
        assert (found.name, found.chains[0].name) == ("t", "c")
        assert (ours.text, ours.expected, ours.packets) == (counted.text, True, 1)
        assert ours.bytes
        assert (theirs.expected, theirs.packets) == (False, None)
        assert "immediate" in theirs.text


def test_replacing_removes_what_was_there_under_the_name() -> None:
    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([EVERYTHING]))
        smaller = Table("everything", (Chain("only"),))
        netns.run(lambda: replace_tables([smaller]))
        assert netns.output("nft", "list", "ruleset") == nft.render([smaller])


def test_deleting_takes_only_the_named_tables_and_minds_no_absence() -> None:
    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([EVERYTHING, Table("other", ())]))
        netns.run(lambda: delete_tables(["everything", "never was"]))
        assert netns.run(list_tables) == ["other"]


def test_all_endpoints_of_a_virtual_address_are_reached_and_no_others() -> None:
    with namespaces("client", "router") as (client, router), ExitStack() as stack:
        wire(client, router, ("10.77.0.2/24", "fd77::2/64"), ("10.77.0.1/24", "fd77::1/64"))
        servers = [stack.enter_context(EchoServer(router.listen(port))) for port in (9001, 9002, 9003)]
        rules = tuple(
            Rule((nft.daddr(ip_address(vip)), nft.tcp_dport(80), nft.counter(), nft.dnat_to_random(endpoints)))
            for vip, endpoints in (
                ("10.96.0.1", [SocketAddress.parse(f"10.77.0.1:{port}") for port in (9001, 9002, 9003)]),
                ("fd96::1", [SocketAddress.parse(f"[fd77::1]:{port}") for port in (9001, 9002, 9003)]),
            )
        )
        table = Table("services", (Chain("prerouting", rules, Hook(ChainType.NAT, HookPoint.PREROUTING, -100)),))
        router.run(lambda: replace_tables([table]))
        for vip in ("10.96.0.1", "fd96::1"):
            for _ in range(60):
                with client.connect(SocketAddress(ip_address(vip), 80)) as sock:
                    assert echoes(sock)
        reached = Counter(client.ip.version for server in servers for client in server.clients)
        assert reached == {4: 60, 6: 60}
        assert all(len(server.clients) > 10 for server in servers)


@pytest.mark.parametrize(("other", "number"), [([*V4[:2], V4[0]], 0), (V4[:2], 0)])
def test_other_endpoints_in_a_map_are_a_difference(other: list[SocketAddress], number: int) -> None:
    def table(endpoints: list[SocketAddress]) -> Table:
        rule = Rule((nft.daddr(ip_address("10.96.0.1")), nft.tcp_dport(80), nft.dnat_to_random(endpoints)))
        return Table("services", (Chain("prerouting", (rule,), Hook(ChainType.NAT, HookPoint.PREROUTING, -100)),))

    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([table(other)]))
        found = netns.run(lambda: find_differences([table(V4)]))
        assert found == [f"table services: chain prerouting: rule {number + 1} is not: {table(V4).chains[0].rules[0].text}"]


def test_a_chain_on_another_hook_is_a_difference() -> None:
    def table(priority: int) -> Table:
        return Table("t", (Chain("c", (), Hook(ChainType.FILTER, HookPoint.INPUT, priority)),))

    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([table(0)]))
        expected = ["table t: chain c is not hooked as type filter hook input priority raw; policy accept;"]
        assert netns.run(lambda: find_differences([table(-300)])) == expected


def test_every_refused_message_is_named_and_nothing_is_done() -> None:
    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([EVERYTHING]))
        before = netns.output("nft", "list", "ruleset")
        broken = Table("everything", (Chain("c", (Rule((nft.jump("nowhere"),)), Rule((nft.accept(),)), Rule((nft.goto("nor here"),)))),))
        with pytest.raises(NftRefused) as caught:
            netns.run(lambda: replace_tables([broken]))
        assert str(caught.value) == (
            "add rule everything c jump nowhere: No such file or directory; add rule everything c goto nor here: No such file or directory"
        )
        assert netns.output("nft", "list", "ruleset") == before


def test_ten_thousand_rules_and_a_thousand_endpoints_go_in_one_transaction() -> None:
    endpoints = [SocketAddress(ip_address(0x0A000000 + number), 80) for number in range(1000)]
    rules = [Rule((nft.daddr(ip_address(0x0A600000 + number)), nft.counter(), nft.accept())) for number in range(10_000)]
    rules.append(Rule((nft.l4proto(6), nft.dnat_to_random(endpoints))))
    table = Table("many", (Chain("prerouting", tuple(rules), Hook(ChainType.NAT, HookPoint.PREROUTING, -100)),))
    with namespaces("nft") as (netns,):
        netns.run(lambda: replace_tables([table]))
        assert netns.run(lambda: find_differences([table])) == []


def test_a_comment_that_the_kernel_would_not_keep_is_refused() -> None:
    table = Table("t", (Chain("c", (Rule((nft.accept(),), "x" * 128),)),))
    with namespaces("nft") as (netns,), pytest.raises(ValueError, match="at most 127 bytes"):
        netns.run(lambda: replace_tables([table]))
