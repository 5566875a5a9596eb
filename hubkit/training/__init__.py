"""Training: rows from files (wing `rows`), steps of them, the loop (`loop.fit`) and its own loss."""
