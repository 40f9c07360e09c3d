"""For: one file a layout of annotations; `vidfuse.data.layouts` chooses among them.
Each file gives `detect(folder) -> bool`, `read(folder, options) -> Source` (see `source`) and `USES`, the options that it has a use for.
May import: `source`, `files`, `vidfuse.config`, `vidfuse.data.shards`.
Never: another layout of this folder, a decoder, Ray.
"""
