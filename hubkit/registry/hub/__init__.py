"""A registry behind the Hub's protocol: requests within deadlines (*transport*, *transfer*, *deadlines*), what is sent
(*uploads*, *streams*), its errors (*faults*), its lists (*listing*).

The session is huggingface_hub's; what that library does not promise is in `hubkit.compat.huggingface_hub`.
"""
