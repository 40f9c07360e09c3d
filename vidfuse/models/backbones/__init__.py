"""For: one file a family of backbones; the file name is the name in the config.
Each file gives `build(*, frames, size, ...) -> Backbone` (see `vidfuse.models.parts`).
May import: torch, timm, torchvision, `vidfuse.models.layers`, `parts`, `weights`.
Never: another file of this folder.
"""
