"""Everything with values in it, in wings that import one way: files, fourbit, base, parts, then weights and lowrank,
front, live. `device` and `native` (compiled C) lie below all of them.
"""
