"""A live base with adapters on it. *attached* is the module to call; the *roster* knows which adapters are there and
hangs hooks at their sites; a *plan* is what one mix does at each site, worked out before a forward and never
changed:

    mix ──make_plan──→ Plan {site: act}  ←─ a forward holds it to its end
    route [a, None, b] ─→ one mix per row ─→ at each site: rows' own factors (RowGroup), or mix by mix

*loading* brings a base from its folder, *folded* merges for a while, *slots* and *compiling* are for torch.compile.
"""
