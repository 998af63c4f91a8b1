"""What happens to a request: which route is its own, and what that route does to it. Pure: values in, values out.

`match` finds the route, `actions` carries its changes out and chooses a destination; `fault`, `cors`, `mirror`, `retry` and `timeouts` are
decisions by themselves, each asked when its turn has come. Chance is an argument, and so is time.
"""
