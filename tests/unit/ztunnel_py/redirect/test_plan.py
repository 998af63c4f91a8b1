"""The rules of a captured pod as golden text; tests/netns holds the same text against what nft lists."""

from __future__ import annotations

import socket

from mesh.linux.nft import render
from ztunnel_py.redirect.plan import PodCapture, plan_capture

MANGLE = """\
table inet istio-ambient-mangle {
	chain prerouting {
		type filter hook prerouting priority mangle; policy accept;
		meta mark & 0x00000fff == 0x00000539 counter ct mark set ct mark & 0xfffff111 | 0x00000111 comment "connections to the application"
	}

	chain output {
		type route hook output priority mangle; policy accept;
		ct mark & 0x00000fff == 0x00000111 counter meta mark set ct mark comment "bring its replies to the agent"
	}
}
"""
FILTER_V4 = """\
table inet istio-ambient-filter {
	chain input {
		type filter hook input priority filter; policy accept;
		iifname != "lo" ip saddr != 169.254.7.127 tcp dport != 15008 tcp dport != 15006 tcp flags syn / fin,syn,rst,ack \
ct state established counter drop comment "connections past the agent"
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oifname != "lo" ip daddr != 127.0.0.1 meta mark & 0x00000fff != 0x00000539 tcp flags syn / fin,syn,rst,ack \
ct state established counter drop comment "connections past the agent"
	}
}
"""
CAPTURED_V4 = f"""\
table inet istio-ambient-nat {{
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		meta l4proto tcp ip saddr 169.254.7.127 counter accept comment "probes of the kubelet"
		ip daddr != 127.0.0.1 tcp dport != 15008 tcp flags syn / fin,syn,rst,ack meta mark & 0x00000fff != 0x00000539 counter \
redirect to :15006 comment "connections to the application"
	}}

	chain output {{
		type nat hook output priority -100; policy accept;
		meta l4proto tcp ip daddr 169.254.7.127 counter accept comment "replies to probes"
		meta l4proto tcp meta mark & 0x00000fff == 0x00000111 counter accept comment "the application's replies"
		oifname "lo" ip daddr != 127.0.0.1 counter accept comment "the pod talks to itself"
		ip daddr != 127.0.0.1 tcp flags syn / fin,syn,rst,ack meta mark & 0x00000fff != 0x00000539 counter \
redirect to :15001 comment "connections the application opens"
	}}
}}
{MANGLE}"""
DIALLED = """\
		meta mark & 0x00001fff == 0x00001539 counter ct original zone set 2 comment "connections the agent opens"
"""
RAW = f"""\
table inet istio-ambient-raw {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
	}}

	chain output {{
		type filter hook output priority raw; policy accept;
{DIALLED}	}}
}}
"""
RAW_WITH_DNS = f"""\
table inet istio-ambient-raw {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		udp sport 53 meta mark & 0x00000fff != 0x00000539 counter ct zone set 1 comment "answers to them"
	}}

	chain output {{
		type filter hook output priority raw; policy accept;
{DIALLED}		udp dport 53 meta mark & 0x00000fff == 0x00000539 counter ct zone set 1 comment "look-ups of the agent"
	}}
}}
"""
LOOKUPS_V4 = """\
		oifname != "lo" meta mark & 0x00000fff != 0x00000539 udp dport 53 counter redirect to :15053 comment "names that the application \
looks up"
		ip daddr != 127.0.0.1 tcp dport 53 tcp flags syn / fin,syn,rst,ack meta mark & 0x00000fff != 0x00000539 counter \
redirect to :15053 comment "the same over TCP"
"""
RELEASING = f"""\
table inet istio-ambient-nat {{
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
	}}

	chain output {{
		type nat hook output priority -100; policy accept;
	}}
}}
{MANGLE}"""


def test_an_ipv4_pod_gets_istios_rules_with_a_test_for_new_connections() -> None:
    plan = plan_capture(PodCapture(ipv6=False))
    assert render(plan.tables) == CAPTURED_V4 + RAW + FILTER_V4
    assert plan.families == (socket.AF_INET,)


def test_a_dual_stack_pod_gets_every_rule_for_both_families() -> None:
    lines = render(plan_capture(PodCapture(ipv6=True)).tables).splitlines()
    v4 = {line for line in lines if " ip daddr " in line or " ip saddr " in line or "\tip daddr" in line}
    v6 = {line for line in lines if "ip6 " in line}
    translated = {
        line.replace("169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff").replace("127.0.0.1", "::1").replace("ip ", "ip6 ")
        for line in v4
    }
    assert len(v4) == 7
    assert v6 == translated
    assert plan_capture(PodCapture(ipv6=True)).families == (socket.AF_INET, socket.AF_INET6)


def test_bypass_leaves_inbound_connections_alone_and_keeps_the_way_back() -> None:
    plan = plan_capture(PodCapture(ipv6=True, bypass_inbound=True))
    text = render(plan.tables)
    assert "15006" not in text
    assert text.count(" drop ") == 2, "outbound, IPv4 and IPv6"
    assert text.count("redirect to :15001") == 2
    assert MANGLE in text


def test_releasing_keeps_empty_nat_chains_and_the_way_back() -> None:
    assert render(plan_capture(PodCapture(ipv6=False)).releasing) == RELEASING + RAW
    assert render(plan_capture(PodCapture(ipv6=True)).releasing) == RELEASING + RAW


def test_look_ups_are_redirected_before_all_other_connections_and_tracked_apart_from_the_agents() -> None:
    plan = plan_capture(PodCapture(ipv6=False, dns=True))
    after = 'comment "replies to probes"\n'
    assert render(plan.tables) == CAPTURED_V4.replace(after, after + LOOKUPS_V4) + RAW_WITH_DNS + FILTER_V4


def test_look_ups_of_a_dual_stack_pod_are_redirected_in_both_families() -> None:
    text = render(plan_capture(PodCapture(ipv6=True, dns=True)).tables)
    assert text.count("redirect to :15053") == 3  # over UDP one rule is for both
    assert text.count("ip6 daddr != ::1 tcp dport 53 ") == 1
    assert RAW_WITH_DNS in text


def test_look_ups_under_way_are_told_apart_while_a_pod_is_released() -> None:
    assert render(plan_capture(PodCapture(ipv6=True, dns=True)).releasing) == RELEASING + RAW_WITH_DNS


def test_bypass_does_not_concern_look_ups() -> None:
    assert render(plan_capture(PodCapture(ipv6=False, bypass_inbound=True, dns=True)).tables).count("15053") == 2
