"""Foreign programs that the tests and benchmarks talk to, made on demand and kept in a cache."""
