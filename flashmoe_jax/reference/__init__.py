"""The operator in plain JAX: the oracle, the sharded path, and what they share."""
