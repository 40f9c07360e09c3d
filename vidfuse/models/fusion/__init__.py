"""For: one file a way of joining streams of tokens; the file name is the name in the config.
Each file gives `build(*, widths, ...) -> Fusion` (see `vidfuse.models.parts`).
May import: torch, `vidfuse.models.layers`, `parts`.
Never: another file of this folder, a backbone.
"""
