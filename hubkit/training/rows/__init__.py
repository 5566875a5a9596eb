"""Rows: *files* and *sets* read records from files and data sets, *data* finds the columns, *chat* makes conversations,
*encode* token ids and targets, *preparing* does all for a training and keeps some for validation, *summary* counts and
*marked* shows what came out, *batching* says which rows stand together in a step.
"""
