"""Documents: manifest, mix, recipe, lock and deployment as dataclasses with their JSON Schemas, canonical JSON, files
written whole, and the names that files may have. Nothing here knows torch or a network.
"""
