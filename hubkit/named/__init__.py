"""What a name in a command stands for: *sources* brings a base or an adapter here, *terms* are weighed adapters of a
sum, *trees* and *members* what a mix holds, *vocabulary* the tokens that adapters add.
"""
