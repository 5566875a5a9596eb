"""What a base or a file is, proven from bytes alone: safetensors headers, digests of tensors and files, and the
fingerprint by which an adapter knows its base again. A *digest* is ``sha256:`` of values or bytes; *counted* are
the tensors that a fingerprint is made of, tied copies once.
"""
