"""Tensors in files: dtypes by name, shards read and written as streams, pickles of weights without running them."""
