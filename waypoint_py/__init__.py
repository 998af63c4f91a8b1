"""The L7 proxy: waypoint, ingress and egress gateway. Its place in the house; nothing of it is built yet (docs/design/ARCHITECTURE.md).

It will stand on `mesh.reactor` for bytes, `mesh.wire.hbone` towards the node agents and `mesh.authz` for policy. It imports no program.
"""
