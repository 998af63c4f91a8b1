"""Byte streams (`waypoint_py.stream`) over what the reactor moves: CONNECT tunnels, TCP connections, and TLS within either."""
