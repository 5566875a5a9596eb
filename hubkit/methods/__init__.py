"""Methods: what a plugin is asked, the host that asks, configuration, and the suite that tests a plugin.

`hubkit.methods` is also the verb of that name: ``hubkit.methods()`` lists what is installed (`hubkit.verbs.methods`).
"""

import sys

from hubkit import VerbPackage

sys.modules[__name__].__class__ = VerbPackage
