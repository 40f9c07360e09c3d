"""For: what needs a Ray cluster or object storage: streaming, fitting, packing, storage.
Takes a config and URLs; gives datasets, fitted runs, scored splits.
May import: ray, pyarrow.fs, s3fs and every room to its left.
Never: optuna, ray.tune, the command line.
"""
