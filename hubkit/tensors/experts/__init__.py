"""Experts of a mixture: one tensor for all of them in the model; in the files single matrices, or that tensor, too.

    files   mlp.experts.7.gate_proj.weight (I, H)        model   mlp.experts.gate_up_proj (E, 2I, H)
            mlp.experts.7.up_proj.weight   (I, H)                rows 0..I of [7] are gate, I..2I up
            mlp.experts.7.down_proj.weight (H, I)                mlp.experts.down_proj    (E, H, I)
    or      mlp.experts.gate_up_proj (E, 2I, H), or turned (E, H, 2I): [7] is the site mlp.experts.7.gate_up_proj

A site is a matrix of one expert, whether the files hold it alone or with others: an `Expert` stands for it as the
linear layer that it is, and hooks and parts act there as at any other. The model calls no such layer, it multiplies by
its tensors; so once something acts at an expert, the module that holds them all runs as `Products`: its own forward
with an object in the place of each tensor, ``tensor[7]`` of which, multiplied by, asks the layers that its rows are.
Nothing the size of a weight is made, and experts that no token is sent to cost nothing. Biases of experts are the
model's own: no site has them. *expert* is the layer and its name, *products* what runs, *finding* how they are found.
"""
