"""For: one worker's life, from restore to the last checkpoint.
Takes a config, a Worker and a Feed of batches; gives checkpoints, metrics and a Result.
May import: vidfuse.config, data, models, evaluate, torch.distributed; DeepSpeed in `engine` and `checkpoint`, MLflow in `tracking` alone.
Never: Ray, storage URLs, credentials.
"""
