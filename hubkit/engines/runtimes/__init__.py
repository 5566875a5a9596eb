"""Running servers: what each says of itself, how it is asked for log-probabilities, and what its answers prove.

`fit` compares answers with an adapter's probes; `wire` speaks HTTP; one file for each protocol, the right one chosen
by `asking.runtime_at`, which asks the server what it is.
"""
