"""The plugin side: hook specifications, the host that finds and calls methods, their configuration, what a plugin
author imports (*api*) and the laws that every method obeys (*suite*).
"""
