"""The commands and their one-line help, as data: ``hubkit --help`` prints this and imports no command.

A test compares every line with the first line of the command's own help.
"""

from __future__ import annotations

SECTIONS: dict[str, dict[str, str]] = {
    "Make": {
        "train": "Train an adapter on a base and your rows.",
        "pack": "Make an adapter folder complete, checked and ready to share.",
    },
    "Look": {
        "methods": "List the methods that are installed, or describe one.",
        "inspect": "Show what an adapter is: manifest, sizes, base, parents.",
        "verify": "Prove that an adapter is whole and belongs to its base.",
        "list": "List what the local store or a registry holds.",
    },
    "Share": {
        "push": "Publish an adapter folder as one commit and one version.",
        "pull": "Fetch an adapter, or a base, into the local store.",
        "serve": "Serve a directory of repositories over the Hub's protocol.",
    },
    "Combine": {
        "compose": "Write several adapters as one: their exact weighted sum.",
        "mix": "Write down how several adapters act together, to share and run.",
        "merge": "Fold adapters into their base and write a new checkpoint.",
        "export": "Write an adapter in another tool's format.",
    },
    "Run": {
        "generate": "Answer a prompt with a base and its adapters.",
        "lock": "Pin a recipe's base and adapters to exact commits and digests.",
        "deploy": "Make a lock runnable for one engine, and check that it stayed so.",
    },
}

COMMANDS: dict[str, str] = {name: line for commands in SECTIONS.values() for name, line in commands.items()}
