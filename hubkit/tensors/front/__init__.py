"""What stands in front of the text: virtual tokens. They never enter the model's cache.

    q of the text ───────────────────────────────────┐
    k, v of the text ─→ the model's cache ─┐         ├─→ attention
    k, v of n virtual tokens ──────────────┴─→ [virtual | text]

An attention module is handed a view of its cache, whose `update` gives both; its mask is widened by n on the left, and
the positions of the text move on by n. Cache lengths, masks and ``generate`` stay the base's own.

A prefix is such keys and values; a prompt is embeddings, which are run once, batch of one, to become keys and values
(*decoder_hooks*), or run with every row where all tokens see each other (*encoder_hooks*). *front* is what one forward
has in front, *plan* says whose it is.
"""
