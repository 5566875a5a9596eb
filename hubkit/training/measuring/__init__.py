"""What a run is judged by and watched with: losses of rows with their intervals, forgetting, tasks, curves.

Above the root of `hubkit.training`, which knows nothing of it: `losses` → `intervals` → `figures`; `curve`, `watching`.
"""
