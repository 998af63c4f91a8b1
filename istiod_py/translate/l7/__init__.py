"""What waypoints are told, made of the objects that route, rule and attach: pure functions, as the rest of translation."""
