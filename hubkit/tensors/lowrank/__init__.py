"""Low-rank parts in a forward. A *group* are sites that are called with one input, so that ``x Aᵀ`` is computed once
for all of them; *rows* says which row of a batch has which mix; *routed* multiplies each row by its own factors, by
two batched products; *kernel* and ``rows.c`` do that for a step of decoding on a CPU.

    x ── q_proj ─┐             group(q, k, v):  x Aᵀ = [x A_qᵀ | x A_kᵀ | x A_vᵀ]
    x ── k_proj ─┼─ one x      computed at the first call, handed to the other two, which know it
    x ── v_proj ─┘             by the identity and version of x: nothing depends on the order of calls
"""
