"""A registry in a folder: repositories with branches, tags and history, content addressed. *objects* are files by
their digest, *history* the commits, *layout* where both lie, *rules* what ``.gitattributes`` says.
"""
