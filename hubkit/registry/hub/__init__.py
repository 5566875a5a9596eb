"""A registry behind the Hub's protocol, through huggingface_hub: its errors (*faults*), its lists (*listing*).

What that library does not promise is in `hubkit.compat.huggingface_hub`; nothing else knows it.
"""
