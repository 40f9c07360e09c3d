"""For: ablations over configs (`ablations`, their rows in `tables`) and searches.
Takes a config and a table of changes; gives trained cells, a table and a picture.
May import: vidfuse, ray.tune, optuna.
Never: the command line.
"""
