"""The L7 proxy: waypoint, later ingress and egress gateway. It imports no program.

Three kinds of code, as everywhere in the mesh. Pure: `http` (messages, codecs, paths), `routing`, `policy` verdicts, `upstream` choice.
On the reactor: `listener`, `exchange`, connections. In trio: what waits (keys fetched, authorizers asked, configuration, certificates).
"""
