"""For: everything between encoded videos and clips.
Takes encoded videos, annotations, shards, seeds; gives shards, manifests, indices, clips and batches.
May import: vidfuse.config, numpy, scipy, OpenCV, PyAV, pyarrow (torch in `batch` alone).
Never: Ray, torch.distributed, credentials, the network's addresses (file systems are handed in).
"""
