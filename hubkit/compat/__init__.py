"""What hubkit reaches of other libraries that they do not promise: one file per library, and nowhere else. The names
that transformers gives to tensors have a file of their own; *silence* serves two of the others.

Each function says what is used, why no public name serves, and between which versions it was read; its test in
``tests/compat`` fails when a release changes it. `tests/test_layers.py` finds private names anywhere else.

Whoever raises a bound in ``pyproject.toml`` runs ``tests/compat`` first: what is red there is mended here.
"""
