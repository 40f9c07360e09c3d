"""For: searches and ablations over configs; nothing is here yet.
Takes a config and a space; gives ranked configs and tables.
May import: vidfuse, ray.tune, optuna.
Never: the command line.
"""
