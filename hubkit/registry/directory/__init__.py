"""A registry in a folder: repositories with branches, tags and history, content addressed. *objects* are files by
their digest, *history* the commits, *layout* where both lie, *rules* what ``.gitattributes`` says, *keeping* what a
keeper does, *usage* how much is stored, *quota* how much may be, *proof* whether all is whole.
"""
