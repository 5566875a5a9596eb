"""The base as adapters see it: *sites*, named places where something can be added, from a live model or from headers
of files alone; *arch* is what is known of an architecture, as data; a *delta* is what is added to one weight.
"""
