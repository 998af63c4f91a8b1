"""Well-known ports and packet marks; `docs/reference/ports.md` is tested against this file. Source: Istio's own assignments."""

from typing import Final

OUTBOUND: Final = 15001
INBOUND_PLAINTEXT: Final = 15006
INBOUND_HBONE: Final = 15008
XDS_AND_CA: Final = 15012
ADMIN: Final = 15000
ISTIOD_MONITORING: Final = 15014
STATS: Final = 15020
READINESS: Final = 15021
DNS: Final = 15053

DOMAIN: Final = 53
"""Where applications ask for names."""

RECURSIVE: Final = frozenset({OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE})
"""Destination ports that would loop a connection back into the agent; never dialled on a peer's or application's request."""

PROXY_MARK: Final = 0x539
"""SO_MARK of every socket the agent opens in a pod: its own traffic, never redirected."""
DIALLED_MARK: Final = 0x1539
DIALLED_MASK: Final = 0x1FFF
"""SO_MARK of those that it connects, `PROXY_MARK` and one bit more; what its listeners accept has not got that bit."""
INBOUND_CONNECTION_MARK: Final = 0x111
"""Conntrack mark of connections the agent opened to the application, to route the replies back to its transparent socket."""
MARK_MASK: Final = 0xFFF
PROXY_DNS_ZONE: Final = 1
"""Conntrack zone of the agent's own look-ups, so that they never meet the entry of an application's that had the same port."""
DIALLED_ZONE: Final = 2
"""Conntrack zone of what the agent connects, in that direction: an application or a client may have a connection, or may just have had
one, with the same addresses and ports."""
INBOUND_ROUTE_TABLE: Final = 100
INBOUND_RULE_PRIORITY: Final = 32764
PROBE_SOURCE_V4: Final = "169.254.7.127"
PROBE_SOURCE_V6: Final = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
