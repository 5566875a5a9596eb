"""What a mix makes of weights: merged into a base as a stream, composed into one adapter, truncated, decoded.
*workers* are the processes that do it site by site.
"""
