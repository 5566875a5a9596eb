"""Where artifacts live. A *registry* holds repositories; a *reference* is what people write to name one; its *address*
says which registry; *opening* gives that. `directory`, `hub` and `server` are registries or serve one; the `store`
is what this machine has pulled.
"""
