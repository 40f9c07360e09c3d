"""For: a checkpoint as a service (export, REST); nothing is here yet.
Takes a run's best checkpoint; gives an exported model and an application.
May import: vidfuse.config, data, models, evaluate, train.
Never: the command line.
"""
