"""The built-in methods: one method, one file. They enter through entry points, like everyone's."""
