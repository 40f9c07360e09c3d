"""For: ablations over configs (`ablations`); searches come here too.
Takes a config and a table of changes; gives trained cells, a table and a picture.
May import: vidfuse, ray.tune, optuna.
Never: the command line.
"""
