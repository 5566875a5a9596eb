"""A registry behind the Hub's protocol, through huggingface_hub: the only folder that knows that library, its errors
(*faults*) and its pages (*listing*).
"""
