"""`trainer_callback`: every checkpoint of transformers' Trainer holds a finished adapter as well. Python only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubkit.documents.arguments import checked
from hubkit.documents.licenses import require_license
from hubkit.verbs.save import save


@checked
def trainer_callback(
    name: str, *, version: str | None = None, license: str | None = None, base: str | Path | None = None
) -> Any:
    """A callback for `transformers.Trainer` and TRL's trainers, whose model is what `hubkit.attach` returned.

    Trainer's own checkpoints hold the adapters' masters and what resuming needs. With this callback each has a folder
    `name` beside these, as `hubkit.save` writes it: to attach, to verify, to push.

        Trainer(model=attached, callbacks=[hubkit.trainer_callback("chat")], ...)

    Args:
        name: of the adapter in the model, and of the folder in each checkpoint.
        version, license, base: as for `hubkit.save`.

    Returns:
        a `transformers.TrainerCallback`.
    """
    from hubkit.tensors.base.tokenizer import transformers_module

    require_license(license)

    class Saving(transformers_module().TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / name
                save(model, name, folder, version=version, license=license, base=base, replace=True)

    return Saving()
