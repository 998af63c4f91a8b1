"""The library that the mesh's programs share; it knows none of them.

Layers, high to low, held by import-linter (pyproject.toml): ``testing > runtime > xds | kube > rpc > tls > reactor > linux > state | http >
authz | wire | telemetry > model``. ``model``, ``authz``, ``wire``, ``http`` and ``state`` are pure: no sockets, no clock, no logging.
"""
