"""The rules that stand for service addresses, as ``nft list`` prints them. What they do is shown in tests/netns."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from mesh.linux.nft import render
from mesh.model.address import SocketAddress
from meshctl_py.lab.endpoints import VirtualPort
from meshctl_py.lab.vips import plan_services

NODE = (IPv4Address("10.99.0.11"), IPv6Address("fd99::b"))


def port(address: str, *targets: str, protocol: str = "TCP") -> VirtualPort:
    return VirtualPort("shop/web", SocketAddress.parse(address), protocol, tuple(map(SocketAddress.parse, targets)))


def test_connections_go_to_a_random_endpoint_and_where_there_is_none_are_refused() -> None:
    table = (
        port("10.96.1.1:80", "10.244.1.2:8080", "10.244.2.2:8080"),
        port("[fd00:10:96::101]:80", "[fd00:10:244:1::2]:8080"),
        port("10.96.1.2:80"),
        port("10.96.1.2:53", protocol="UDP"),
    )
    assert render([plan_services(table, NODE)]) == (
        "table inet lab-services {\n"
        "\tchain services {\n"
        "\t\tip daddr 10.96.1.1 tcp dport 80 dnat ip to numgen random mod 2 map "
        '{ 0 : 10.244.1.2 . 8080, 1 : 10.244.2.2 . 8080 } comment "shop/web"\n'
        '\t\tip6 daddr fd00:10:96::101 tcp dport 80 dnat ip6 to [fd00:10:244:1::2]:8080 comment "shop/web"\n'
        "\t}\n\n"
        "\tchain nobody {\n"
        '\t\tip daddr 10.96.1.2 tcp dport 80 reject with tcp reset comment "shop/web"\n'
        '\t\tip daddr 10.96.1.2 udp dport 53 drop comment "shop/web"\n'
        "\t}\n\n"
        "\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\t\tjump services\n\t}\n\n"
        "\tchain output {\n\t\ttype nat hook output priority -100; policy accept;\n\t\tjump services\n\t}\n\n"
        "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        '\t\tip saddr 10.244.1.2 ip daddr 10.244.1.2 snat ip to 10.99.0.11 comment "a pod sent to itself"\n'
        '\t\tip saddr 10.244.2.2 ip daddr 10.244.2.2 snat ip to 10.99.0.11 comment "a pod sent to itself"\n'
        '\t\tip6 saddr fd00:10:244:1::2 ip6 daddr fd00:10:244:1::2 snat ip6 to fd99::b comment "a pod sent to itself"\n'
        "\t}\n\n"
        "\tchain forward-filter {\n\t\ttype filter hook forward priority filter; policy accept;\n\t\tjump nobody\n\t}\n\n"
        "\tchain output-filter {\n\t\ttype filter hook output priority filter; policy accept;\n\t\tjump nobody\n\t}\n"
        "}\n"
    )
