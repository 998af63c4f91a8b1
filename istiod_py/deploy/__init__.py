"""Deploys waypoints: for every Gateway of their class what runs it, and in its status what became of that.

One controller for two places: on Kubernetes objects are applied to the API server, by the leader; beside a directory they are files of
another directory, which whoever runs pods there reads as if the user had written them. Neither writes over what somebody else made.
"""

from istiod_py.deploy.controller import GatewayController

__all__ = ["GatewayController"]
