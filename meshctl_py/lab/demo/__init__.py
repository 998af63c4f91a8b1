"""``make demo``: the claims of an ambient mesh, each shown on real traffic in a lab.

`mesh` is the first act, what node agents do; `waypoint` the second, what a waypoint does. `stage` is what both stand on.
"""
