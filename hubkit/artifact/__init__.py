"""An artifact on disk: an adapter's folder that appears whole or not at all, its model card, and the forms in which
PEFT and AdapterHub store the same. An *artifact* is a folder with a manifest; *staging* is the private folder it is
made in.
"""
