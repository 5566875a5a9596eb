"""What this machine has pulled: a read-only store, found again by digest (*index*). *selection* says what of a
repository is an artifact's, *fetching* brings it into staging and checks it; *needs* says what must stay and *pruning*
what may go.
"""
