"""The commands and their one-line help, as data: ``hubkit --help`` prints this and imports no command.

A test compares every line with the first line of the command's own help.
"""

from __future__ import annotations

SECTIONS: dict[str, dict[str, str]] = {
    "Make": {
        "advise": "Say which method and options fit a base and your rows, and why.",
        "plan": "Show how much memory training a base takes, method by method.",
        "train": "Train an adapter on a base and your rows.",
        "pack": "Make an adapter folder complete, checked and ready to share.",
    },
    "Look": {
        "methods": "List the methods that are installed, or describe one.",
        "inspect": "Show what an adapter is: manifest, sizes, base, parents.",
        "eval": "Measure an adapter beside its base, and what it forgot.",
        "verify": "Prove that an adapter is whole and belongs to its base.",
        "list": "List what the local store or a registry holds.",
        "diff": "Show what two adapters differ in.",
        "log": "List the versions of an adapter, and what changed from one to the next.",
        "search": "Find adapters by words, base, method, task, owner or licence.",
        "cache": "Look after the local store: what it holds and why, read it again, make room.",
        "config": "Show every setting with where it comes from, or change the settings file.",
        "completion": "Print the script that makes a shell complete commands, options and references.",
    },
    "Share": {
        "push": "Publish an adapter folder as one commit and one version.",
        "pull": "Fetch an adapter, or a base, into the local store.",
        "copy": "Copy an adapter or a base from one registry to another, to the byte.",
        "tag": "Give a commit that is published a version.",
        "yank": "Take a version back: ranges no longer choose it, locks keep it.",
        "login": "Say who you are to the registry, and what your token may do.",
        "serve": "Serve a directory of repositories over the Hub's protocol.",
        "users": "Say who may use a served registry, and make their tokens.",
    },
    "Combine": {
        "compose": "Write several adapters as one: their exact weighted sum.",
        "mix": "Write down how several adapters act together, to share and run.",
        "merge": "Fold adapters into their base and write a new checkpoint.",
        "extract": "Make an adapter of what a checkpoint changed in its base.",
        "migrate": "Rename an adapter's modules to those that its base has now, and prove it.",
        "rebase": "Carry an adapter over to another state of its base, and measure its drift.",
        "export": "Write an adapter in another tool's format.",
    },
    "Run": {
        "generate": "Answer a prompt with a base and its adapters.",
        "predict": "Label rows, or one text, with an adapter that has a head.",
        "add": "Add an adapter to the recipe and lock it.",
        "remove": "Take adapters out of the recipe and its lock.",
        "lock": "Pin a recipe's base and adapters to exact commits and digests.",
        "outdated": "Show what is pinned, what its reference means now, and the newest there is.",
        "sync": "Bring everything that the lock names here, and prove it.",
        "bundle": "Write everything that a lock names into one file.",
        "probe": "Ask a running server whether it applies what was locked.",
        "deploy": "Make a lock runnable for one engine, check that it stayed so, compare, go back.",
    },
}

COMMANDS: dict[str, str] = {name: line for commands in SECTIONS.values() for name, line in commands.items()}
