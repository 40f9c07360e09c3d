"""For: judging a recogniser from its logits, and showing what a packed set is.
Takes logits, labels, class names, training records, the survey of a set; gives figures, tables and one self-contained report.html.
May import: vidfuse.config, numpy, scipy, matplotlib, jinja2.
Never: Ray, DeepSpeed, torch, storage, a model.
"""
