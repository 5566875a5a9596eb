"""``python -m hubkit`` is the ``hubkit`` command."""

from hubkit.cli import main

if __name__ == "__main__":
    main()
