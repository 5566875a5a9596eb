"""The plugin side: hook specifications, the host that finds and calls methods, their configuration, what a plugin
author imports (*api*) and the laws that every method obeys (*suite*).

`hubkit.methods` is also the verb of that name: ``hubkit.methods()`` lists what is installed (`hubkit.verbs.methods`).
"""

import sys

from hubkit import VerbPackage

sys.modules[__name__].__class__ = VerbPackage
