"""GGUF, the files of llama.cpp and what is built on it.

``header``   what a GGUF file says of itself, read with every bound checked
``base``     a base in GGUF: its tensors' values, decoded
``names``    which architectures are known, and where the weight of a site lies there
``proof``    that a GGUF holds the base's weights, row by row, and in which order
``adapter``  an adapter as GGUF, beside such a base
``model``    a merged model as GGUF: into such a base, or by llama.cpp's own converter
"""
