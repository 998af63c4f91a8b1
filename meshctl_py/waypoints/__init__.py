"""``meshctl waypoint``: waypoints as Gateways, in a cluster or in the YAML that a lab lives from."""
