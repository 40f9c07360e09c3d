"""vidfuse: distributed training of video action recognisers on Ray.

`config` describes a run; `data` turns videos into clips; `models` turns clips into logits; `train` is one
worker's life; `on_ray` joins workers, streams and storage; `evaluate` judges. Imports go one way: README, "The tree".
"""
