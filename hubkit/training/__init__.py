"""Training: rows from files (`data`, `encode`), steps of them (`batching`), the loop (`loop.fit`) and its own loss."""
