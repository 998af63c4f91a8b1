"""Who may do what: authorization, tokens, external authorizers. Verdicts are pure; only fetching and asking waits."""
