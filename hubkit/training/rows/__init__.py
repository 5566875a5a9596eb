"""Rows: *data* reads records from files and finds the columns, *encode* makes token ids and targets of each,
*preparing* does both for a training and keeps some for validation, *batching* says which rows stand together in a step.
"""
