"""What one adapter adds, and several: a *part* acts at one site, an *adapter* is parts and a method, a *mix* says how
adapters act together (*sum*, *stack*, *route*). *additive*, *whole* and *tied* are kinds of parts that the host
offers.
"""
