"""Weights in 4 bits: *nf4* is the codec in torch alone and the reference, *decode* chooses what decodes (C, Triton,
torch), *linear* a layer whose frozen weight is packed, *dense* one that multiplies by floats meanwhile, *divided* one
of which each process holds a share, *files* what bitsandbytes wrote.
"""
