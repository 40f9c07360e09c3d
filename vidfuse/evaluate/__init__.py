"""For: judging a recogniser from its logits.
Takes logits, labels, class names, training records; gives figures, tables and one self-contained report.html.
May import: vidfuse.config, numpy, scipy, matplotlib, jinja2.
Never: Ray, DeepSpeed, torch, storage, a model.
"""
