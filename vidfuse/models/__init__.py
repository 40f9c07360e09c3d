"""For: everything between a clip and its logits.
Takes uint8 clips [B, T, C, H, W]; gives logits [B, K] and, if asked, attention.
May import: torch; timm, torchvision, transformers inside `backbones/` alone.
Never: Ray, DeepSpeed, storage, the config (modules take plain keyword arguments).
"""
