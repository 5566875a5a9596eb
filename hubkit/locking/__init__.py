"""From a recipe to a lock and from a lock to what it names.

*editing* changes a recipe; *resolver* pins, with *pinned_base* and *policy*; *conflicts* takes a merge apart and
*differences* says what moved; *renewal* writes recipe and lock together, *freshness* compares a lock with what it was
made from; *bundling* puts what a lock names into an archive and takes it out again.
"""
