"""How far a merged model may be from its tuning before it is refused."""

# Rounding the sums to bfloat16 cost the default base 0.002 nats a token and 2 % of the greedy tokens (docs/log.md).
MAX_KL = 0.01  # nats a token
MAX_FLIPS = 0.05  # share of greedy tokens
